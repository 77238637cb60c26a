"""References that follow the policy: TR-DPO's soft update and BEMA's bias-corrected average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prefopt.reference.merged import merged_weights
from prefopt.reference.weights import named_weights

__all__ = ["BEMASchedule", "BEMAState", "divided_like", "follow", "local_part", "part_of", "soft_update"]


@torch.no_grad()
def follow(reference: Mapping[str, Tensor], policy: nn.Module, alpha: float) -> None:
    """`soft_update` of a reference towards a policy; alpha 0 only checks that it can follow.

    A reference that has the policy's weights, or its trained ones, follows them by name. One without adapters follows
    a policy with adapters by the weights that these are merged into.

    Args:
        reference: name -> tensor, written to.
        policy: the unwrapped model.
        alpha: mixing weight in [0, 1].

    Raises:
        ValueError: the two are of different forms.
    """
    own = named_weights(policy)
    if any(hasattr(weight, "ds_id") for weight in own.values()):
        raise ValueError(
            "DeepSpeed ZeRO-3 holds every weight in pieces that have no values by name, so no reference can follow "
            "them. Use FSDP2, which divides the weights too, or ZeRO-2."
        )
    if reference.keys() <= own.keys() or not hasattr(policy, "peft_config"):
        soft_update(reference, own, alpha)
        return
    left = dict(reference)
    for name, tensor in merged_weights(policy):
        if name not in left:
            raise ValueError(
                f"The policy with its adapters merged in has a weight {name!r}, the reference has none of that name. "
                "It can follow a policy with adapters if it is the same model with the same adapters, or without any: "
                "what lies between two adapters of different forms, or between a head that is tied to the embeddings "
                "and one that an adapter changes, is of neither form. Leave `ref_model` out, or merge its adapters."
            )
        soft_update({name: left.pop(name)}, {name: tensor}, alpha)
    soft_update(left, {}, alpha)


@torch.no_grad()
def soft_update(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor], alpha: float) -> None:
    r"""Move the reference towards the policy, in place.

    .. math:: \theta_{ref} \leftarrow \alpha\,\theta + (1 - \alpha)\,\theta_{ref}

    Computed in float32 and rounded once to the reference's type. Equal weights stay exactly equal. For LoRA the
    factors are averaged, which is not the average of their products: with A and B both moving,
    (aB + (1-a)B')(aA + (1-a)A') has cross terms. At alpha 1 and 0 both agree.

    Args:
        reference: name -> tensor, written to.
        policy: name -> tensor; names that only the policy has are left alone.
        alpha: mixing weight in [0, 1]; 1 copies the policy.

    Raises:
        ValueError: alpha outside [0, 1], or weights that do not fit.

    Gorbatovski et al., "Learn Your Reference Model for Real Good Alignment", 2024, https://arxiv.org/abs/2404.09656.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`ref_model_mixup_alpha` is {alpha}, but the mixing weight lies in [0, 1].")
    for name, old in reference.items():
        new = policy.get(name)
        if new is None or new.shape != old.shape:
            raise ValueError(
                f"The reference has a weight {name!r} of shape {tuple(old.shape)}, the policy "
                f"{'none of that name' if new is None else f'one of shape {tuple(new.shape)}'}. A reference can follow "
                "the policy only if both are the same model: leave `ref_model` out, or give a copy of the policy."
            )
        old.copy_(torch.lerp(old.float(), new.to(old.device).float(), alpha))


@dataclass(frozen=True, kw_only=True)
class BEMASchedule:
    """The step-dependent weights of BEMA; see `BEMAState`."""

    ema_power: float = 0.5
    """kappa: how fast an update's weight in the average falls; 0 makes the average the current weights."""
    bias_power: float = 0.2
    """eta: how fast the bias correction falls; 0 keeps it at 1."""
    lag: float = 10
    """rho: age of the average at step 0."""
    multiplier: float = 1.0
    """gamma: age gained per step."""
    min_ema_multiplier: float = 0.0
    """Lower bound of beta_t."""

    def beta(self, step: int) -> float:
        """beta_t = max((rho + gamma t)^-kappa, bound): weight of the current weights in the average."""
        return max((self.lag + self.multiplier * step) ** -self.ema_power, self.min_ema_multiplier)

    def alpha(self, step: int) -> float:
        """alpha_t = (rho + gamma t)^-eta: weight of the bias correction."""
        return (self.lag + self.multiplier * step) ** -self.bias_power


class BEMAState:
    r"""The bias-corrected exponential moving average of a run's weights, in float32.

    .. math::
        E_t &= (1 - \beta_t)\,E + \beta_t\,\theta_t \\
        \theta'_t &= E_t + \alpha_t\,(\theta_t - \theta_0)

    Args:
        weights: name -> tensor, the weights theta_0 that the average starts from.
        device: where the three buffers (theta_0, E, theta') are kept. Of a weight that is divided among ranks each
            keeps its own part (`local_part`).

    Block and Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes", 2025,
    https://arxiv.org/abs/2508.00180.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.device = device
        self.average = self.copies(weights)
        self.restart(weights)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Let theta_0 and E be ``weights``; theta' stays what it was until the next `update`."""
        self.start = self.copies(weights)
        self.ema = self.copies(weights)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], *, beta: float, alpha: float) -> None:
        """Take in the current weights theta_t."""
        for name, current in weights.items():
            current = local_part(current).to(self.device, torch.float32)
            ema = self.ema[name].lerp_(current, beta)
            self.average[name] = ema + alpha * (current - self.start[name])

    def copies(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: local_part(w).to(self.device, torch.float32, copy=True) for name, w in weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All buffers, flat, for a checkpoint."""
        buffers = {"start": self.start, "ema": self.ema, "average": self.average}
        return {f"{kind}.{name}": tensor for kind, tensors in buffers.items() for name, tensor in tensors.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: it was made for other weights.
        """
        own = self.state_dict()
        if own.keys() != saved.keys():
            raise ValueError(
                f"The saved BEMA average does not fit this model: {sorted(own.keys() ^ saved.keys())[:5]} are in only "
                "one of them. Resume with the model and adapter the run was started with."
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def local_part(weight: Tensor) -> Tensor:
    """What this rank has of a weight, which may be divided among ranks (FSDP2)."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def divided_like(part: Tensor, weight: Tensor) -> Tensor:
    """``part``, of which every rank has its own, as one tensor that is divided as ``weight`` is."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part.to(weight.to_local().device),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def part_of(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """What this rank has of a whole ``tensor`` if it is divided as ``weight`` is."""
    if not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor.to(weight.to_local().device), weight.device_mesh, weight.placements).to_local()
