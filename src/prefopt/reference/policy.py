"""The reference policy: one object that is asked for the log-probs of a batch, whatever it is made of.

=================== ====================================================== ==========================
class               weights                                                what it costs
=================== ====================================================== ==========================
`SeparateModel`     a model of its own: the user's, or a snapshot          a second model
`AdapterOff`        the policy without its adapters                        nothing
`StartingWeights`   the policy with its trainable weights as they began    a copy of those weights
`NamedAdapter`      the policy with another adapter active                 that adapter
`Precomputed`       none: the log-probs come with the data                 nothing
=================== ====================================================== ==========================

Before any of the first four may stand `prefopt.reference.Remembered`, which asks it once for each pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from prefopt.reference.adapters import adapter_off, adapter_switched, starting_parameters
from prefopt.reference.fingerprints import fingerprint, probe
from prefopt.reference.weights import copied, is_sharded, named_weights, placed, put_together, reshard, swapped
from prefopt.scoring.forward import evaluating, install, score
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import Branch, PreferenceBatch, SequenceStats

__all__ = [
    "AdapterOff",
    "ModelReference",
    "NamedAdapter",
    "Precomputed",
    "ReferencePolicy",
    "SeparateModel",
    "StartingWeights",
    "snapshot",
    "stats_of_sums",
]

Kind = TypeVar("Kind")


class ReferencePolicy(ABC):
    """log pi_ref(y | x) of the completions of a batch, without gradient and without dropout."""

    derives_from_policy: bool = True
    """Whether it agrees with the policy before the first step; `check_identity` then holds it to that."""
    source: ReferencePolicy | None = None
    """The reference behind this one, which is asked where this one has no answer."""

    @abstractmethod
    def __call__(self, batch: PreferenceBatch) -> Mapping[Branch, SequenceStats]:
        """Branch -> statistics of its P completions; only ``sum_logps`` and ``num_tokens`` are filled."""

    def find(self, kind: type[Kind]) -> Kind | None:
        """This reference, or the first one behind it, that is a ``kind``."""
        if isinstance(self, kind):
            return self
        return None if self.source is None else self.source.find(kind)


class ModelReference(ReferencePolicy):
    """A reference that is computed by a model.

    Args:
        model: the model that is run, unwrapped. It may be exchanged for a prepared one (FSDP2, DeepSpeed).
        ld_alpha: LD-DPO's weight of the tokens after the shorter completion's length, as for the policy.
    """

    def __init__(self, model: nn.Module, *, ld_alpha: float | None = None) -> None:
        install(model)
        self.model = model
        self.ld_alpha = ld_alpha

    @abstractmethod
    def active(self) -> AbstractContextManager[nn.Module]:
        """The model with the reference's weights in force, as long as the context lasts."""

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> dict[Branch, SequenceStats]:
        with self.active() as model, evaluating(model):
            scores = score(model, batch)
        return sequence_stats(scores.tokens, batch.layout, ld_alpha=self.ld_alpha)

    def weights(self) -> dict[str, Tensor]:
        """The tensors that a moving average may write to, by the policy's parameter names.

        Raises:
            ValueError: where the reference has no weights of its own.
        """
        raise ValueError(
            f"The reference is {type(self).__name__}, which has no weights of its own to update. Leave "
            "`ref_adapter_name` and `ref_model` out, and let `make_reference` know that it is updated (`updates=True`)."
        )

    @torch.no_grad()
    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Write ``saved`` (from a checkpoint, the names of `weights`) over the reference's weights."""
        own = self.weights()
        if own.keys() != saved.keys():
            raise ValueError(
                f"The checkpoint's reference does not fit this one: {sorted(own.keys() ^ saved.keys())[:5]} are in "
                "only one of them. Resume with the model, adapter and reference options the run was started with."
            )
        for name, tensor in own.items():
            tensor.copy_(placed(name, saved[name], tensor))

    def fingerprint(self, **settings: object) -> str:
        """`fingerprint` of the weights that are actually used; ``settings`` as there."""
        with self.active() as model:
            return fingerprint(model, **settings)

    def probe(self) -> bytes:
        """`probe` of the same weights."""
        with self.active() as model:
            return probe(model)

    def to(self, device: torch.device | str) -> None:
        """Move what the reference holds for itself; one that is part of the policy's model holds nothing to move."""


class SeparateModel(ModelReference):
    """A model of its own, frozen and in evaluation mode."""

    def __init__(self, model: nn.Module, *, derives_from_policy: bool, ld_alpha: float | None = None) -> None:
        super().__init__(model.requires_grad_(False).eval(), ld_alpha=ld_alpha)
        self.derives_from_policy = derives_from_policy

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        yield self.model
        reshard(self.model)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in named_weights(self.model).items()}

    def to(self, device: torch.device | str) -> None:
        if not is_sharded(self.model):  # its parts lie where the engine put them
            self.model.to(device)


class AdapterOff(ModelReference):
    """The policy's model with its adapters switched off: where they start as an identity, its starting point."""

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with adapter_off(self.model):
            yield self.model


class StartingWeights(ModelReference):
    """The policy's model with every weight that training may change as it was when this was made.

    For a PEFT model that is a frozen copy of its adapters, biases and ``modules_to_save``.
    """

    def __init__(self, model: nn.Module, *, ld_alpha: float | None = None) -> None:
        super().__init__(model, ld_alpha=ld_alpha)
        self.start: dict[str, Tensor] = copied(starting_parameters(model))

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with swapped(self.model, self.start):
            yield self.model

    def weights(self) -> dict[str, Tensor]:
        policy = named_weights(self.model)
        for name, tensor in self.start.items():  # which may have been taken before the model was moved or divided
            self.start[name] = placed(name, tensor, policy.get(name))
        return self.start

    def to(self, device: torch.device | str) -> None:
        self.start = {name: tensor.to(device) for name, tensor in self.start.items()}


class NamedAdapter(ModelReference):
    """The policy's model with the adapter ``name`` active, one that the user loaded for this."""

    derives_from_policy = False

    def __init__(self, model: nn.Module, name: str, *, ld_alpha: float | None = None) -> None:
        super().__init__(model, ld_alpha=ld_alpha)
        self.name = name

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with adapter_switched(self.model, self.name):
            yield self.model


class Precomputed(ReferencePolicy):
    """Log-probs that came with the rows; where a batch has none, ``source`` computes them.

    Args:
        source: for rows that were not precomputed (streams, a new set in ``evaluate``).
    """

    derives_from_policy = False
    """What comes with the data may be of any model: it is not held against the policy."""

    def __init__(self, source: ReferencePolicy | None = None) -> None:
        self.source = source

    def __call__(self, batch: PreferenceBatch) -> Mapping[Branch, SequenceStats]:
        if batch.ref_sum_logps is not None:
            return stats_of_sums({branch: sums.float() for branch, sums in batch.ref_sum_logps.items()}, batch)
        if self.source is None:
            raise ValueError(
                f"Rows {list(batch.rows)} have no reference log-probs. Give every row `ref_chosen_logps` and "
                "`ref_rejected_logps`, or leave both columns out and let the trainer compute them."
            )
        return self.source(batch)


def stats_of_sums(sums: Mapping[Branch, Tensor], batch: PreferenceBatch) -> dict[Branch, SequenceStats]:
    """Statistics with the [P] log-probs that are known of each branch, in nats."""
    num_tokens = batch.layout.num_tokens.float()
    return {
        branch: SequenceStats(values, num_tokens[batch.layout.sequence_slice(branch)])
        for branch, values in sums.items()
    }


def snapshot(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` as it is now, without gradients. Take it before training or sharding begins."""
    with put_together(model.parameters()):
        copy = deepcopy(model)
    copy.zero_grad(set_to_none=True)
    return copy
