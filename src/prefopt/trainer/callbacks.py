"""Callbacks that average weights: TR-DPO's moving reference and BEMA."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefopt.reference import (
    BEMASchedule,
    BEMAState,
    ModelReference,
    divided_like,
    follow,
    named_weights,
    part_of,
    swapped,
)
from prefopt.reference.weights import is_sharded
from prefopt.trainer.saving.sharded_states import whole_state

__all__ = ["BEMACallback", "SyncReferenceCallback", "updates_reference"]

logger = logging.getLogger(__name__)


class SyncReferenceCallback(TrainerCallback):
    """TR-DPO: every ``ref_model_sync_steps`` optimizer steps the reference moves towards the policy (`follow`).

    Args:
        reference: made with ``updates=True``.
        args: a config with ``ref_model_sync_steps`` and ``ref_model_mixup_alpha``, which are read at every step.
    """

    def __init__(self, reference: ModelReference, args: Any) -> None:
        self.reference, self.options = reference, args

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        follow(self.reference.weights(), extract_model_from_parallel(kwargs["model"]), 0.0)  # or say now that it cannot

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.options.ref_model_sync_steps == 0:
            policy = extract_model_from_parallel(kwargs["model"])
            follow(self.reference.weights(), policy, self.options.ref_model_mixup_alpha)


class BEMACallback(TrainerCallback):
    r"""Keeps a bias-corrected exponential moving average of the trained weights (`BEMAState`).

    At steps t = ``update_after`` + ``update_freq``, + 2 ``update_freq``, ...

    .. math::
        E_t &= (1 - \beta_t)\,E + \beta_t\,\theta_t, & \beta_t &= \max((\rho + \gamma t)^{-\kappa}, m) \\
        \theta'_t &= E_t + \alpha_t\,(\theta_t - \theta_0), & \alpha_t &= (\rho + \gamma t)^{-\eta}

    Only trainable weights are averaged, so a PEFT model keeps three copies of its adapter. The averaged model (or
    adapter) is saved to ``<output_dir>/bema`` at the end; `running_model` gives it at any time.

    Args:
        update_freq: optimizer steps between two updates.
        ema_power: kappa; 0 makes the average the current weights.
        bias_power: eta; 0 keeps the bias correction at its full strength.
        lag: rho, the average's age at step 0.
        update_after: theta_0 and E are taken anew at this step, and updates begin after it.
        multiplier: gamma, age gained per step.
        min_ema_multiplier: m, lower bound of beta.
        device: where the average is kept.
        update_ref_model: also make the average the reference, at steps ``ref_model_update_after`` + k
            ``ref_model_update_freq``, k = 0, 1, ... The trainer sets ``reference``.
        ref_model_update_freq: optimizer steps between two updates of the reference.
        ref_model_update_after: steps before the first of them.

    Raises:
        ValueError: an option outside its range.

    Block and Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes", 2025,
    https://arxiv.org/abs/2508.00180.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ) -> None:
        for option, every in (("update_freq", update_freq), ("ref_model_update_freq", ref_model_update_freq)):
            if every < 1:
                raise ValueError(f"`{option}` is {every}, but it is a number of steps of at least 1.")
        if lag + multiplier <= 0:
            raise ValueError(f"`lag` ({lag}) + `multiplier` ({multiplier}) must be above 0: it is the age at step 1.")
        self.update_freq, self.update_after, self.device = update_freq, update_after, device
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq, self.ref_model_update_after = ref_model_update_freq, ref_model_update_after
        self.schedule = BEMASchedule(
            ema_power=ema_power,
            bias_power=bias_power,
            lag=lag,
            multiplier=multiplier,
            min_ema_multiplier=min_ema_multiplier,
        )
        self.reference: ModelReference | None = None
        self.model: nn.Module | None = None
        self.average: BEMAState | None = None
        self.resumed: Mapping[str, Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model = model = extract_model_from_parallel(kwargs["model"])
        if self.update_ref_model and self.reference is None:
            raise ValueError(
                "`update_ref_model=True`, but this run has no reference that can be updated. It goes with DPOTrainer, "
                "without `precompute_ref_log_probs` and `ref_adapter_name`."
            )
        if self.reference is not None and self.update_ref_model:
            follow(self.reference.weights(), model, 0.0)  # or say now that it cannot
        self.average = BEMAState(self.trained_weights(), self.device)
        if self.resumed is not None:
            self.average.load_state_dict(self.parts(self.resumed))
            self.resumed = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.average is not None
        step = state.global_step
        since = step - self.update_after
        if since == 0:
            self.average.restart(self.trained_weights())
        elif since > 0 and since % self.update_freq == 0:
            beta, alpha = self.schedule.beta(step), self.schedule.alpha(step)
            self.average.update(self.trained_weights(), beta=beta, alpha=alpha)
        since = step - self.ref_model_update_after
        if self.update_ref_model and since >= 0 and since % self.ref_model_update_freq == 0:
            self.move_reference()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.model is not None
        assert args.output_dir is not None
        with swapped(self.model, self.averaged_weights()) as model:
            writes = state.is_world_process_zero
            whole = whole_state(model.state_dict(), keep=writes) if is_sharded(model) else None
            if writes:
                model.save_pretrained(str(Path(args.output_dir) / "bema"), state_dict=whole)  # type: ignore[operator]

    def move_reference(self) -> None:
        """Make the averaged model the reference."""
        assert self.model is not None
        assert self.reference is not None
        weights = self.reference.weights()
        with swapped(self.model, self.averaged_weights()) as model:
            follow(weights, model, 1.0)

    @property
    def running_model(self) -> nn.Module:
        """A copy of the model with the averaged weights, made when asked for.

        Raises:
            ValueError: before training.
        """
        if self.model is None or self.average is None:
            raise ValueError("There is no averaged model before training begins.")
        with swapped(self.model, self.averaged_weights()) as model:
            return deepcopy(model)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The average, divided among the ranks as the model is."""
        assert self.average is not None
        weights = self.trained_weights()
        return {name: divided_like(part, weights[name]) for name, part in self.average.average.items()}

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Name -> weight, of those that training changes.

        Raises:
            AssertionError: before training has begun.
        """
        assert self.model is not None
        return {name: weight for name, weight in named_weights(self.model).items() if weight.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The average, for a checkpoint, divided among the ranks as the model is; empty before training."""
        if self.average is None:
            return {}
        weights = self.trained_weights()
        parts = self.average.state_dict().items()
        return {key: divided_like(part, weights[weight_name(key)]) for key, part in parts}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Let the training that begins next continue from `state_dict`."""
        self.resumed = saved

    def parts(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank has of each tensor of a `state_dict`."""
        weights = self.trained_weights()
        return {key: part_of(tensor, weights.get(weight_name(key))) for key, tensor in saved.items()}


def weight_name(key: str) -> str:
    """The weight that an entry of `BEMAState.state_dict` is about."""
    return key.partition(".")[2]


def updates_reference(args: Any, callbacks: list[TrainerCallback] | None) -> bool:
    """Whether the reference moves during training: TR-DPO, or BEMA for the reference."""
    by_callback = any(isinstance(c, BEMACallback) and c.update_ref_model for c in callbacks or ())
    return by_callback or getattr(args, "sync_ref_model", False)
