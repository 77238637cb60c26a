"""Which reference a run has."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from prefopt.reference.adapters import is_peft, starts_as_identity
from prefopt.reference.policy import (
    AdapterOff,
    ModelReference,
    NamedAdapter,
    Precomputed,
    ReferencePolicy,
    SeparateModel,
    StartingWeights,
    snapshot,
)
from prefopt.reference.remembered import Remembered
from prefopt.scoring.forward import innermost

__all__ = ["make_reference"]

logger = logging.getLogger(__name__)


def make_reference(
    model: nn.Module,
    ref_model: nn.Module | None = None,
    *,
    precomputed: bool = False,
    updates: bool = False,
    remember: bool = False,
    ld_alpha: float | None = None,
    model_adapter_name: str | None = None,
    ref_adapter_name: str | None = None,
    force_use_ref_model: bool = False,
) -> ReferencePolicy:
    """The reference of a run that starts from ``model`` as it is now. Call it before anything trains or shards it.

    ============================================================== ======================================
    given                                                          reference
    ============================================================== ======================================
    ``ref_model``                                                  that model, frozen
    ``ref_adapter_name``                                           the policy with that adapter active
    a model without adapters, or ``force_use_ref_model``           a snapshot of it
    a PEFT model that starts as an identity, never updated         the policy with its adapters off
    any other PEFT model (trained, PiSSA, OLoRA, DoRA, biases,     the policy with its trainable weights
    prompts) or one whose reference is updated                     as they are now
    ============================================================== ======================================

    Whether an adapter was made by the trainer or came with the model makes no difference: the reference is always
    what the policy starts from. A ``ref_model`` that is the policy itself, or the model under its adapters, counts as
    not given: its weights are those that are trained.

    Args:
        model: the policy, unwrapped; a ``PreTrainedModel`` or a ``PeftModel``.
        ref_model: the user's reference.
        precomputed: the log-probs come with the rows; the model reference stands in where they do not.
        updates: the reference's weights will be updated (TR-DPO, BEMA).
        remember: ask the model once for each pair and look its log-probs up afterwards (`Remembered`).
        ld_alpha: LD-DPO's weight, as for the policy.
        model_adapter_name: the adapter that is trained; it is made the active one.
        ref_adapter_name: a loaded adapter that is the reference.
        force_use_ref_model: let the reference be a model of its own also for a PEFT policy.

    Raises:
        ValueError: an adapter that is not there, or options that contradict each other.
    """
    if ref_model is not None and innermost(ref_model) is innermost(model):
        ref_model = None
    check_adapter_options(model, ref_model, model_adapter_name, ref_adapter_name)
    assert not (updates and remember), "a reference that moves has no log-probs to remember"
    if updates and (precomputed or ref_adapter_name is not None):
        option = "precompute_ref_log_probs` or the column `ref_chosen_logps" if precomputed else "ref_adapter_name"
        raise ValueError(
            f"`{option}` is set, and so is an update of the reference during training (`sync_ref_model` or BEMA's "
            f"`update_ref_model`): it would leave the reference that `{option}` names behind. Set one of the two."
        )
    if model_adapter_name is not None:
        model.set_adapter(model_adapter_name)  # type: ignore[operator]
    if ref_model is None:
        scorer = reference_from_policy(model, updates, ref_adapter_name, force_use_ref_model, ld_alpha)
    else:
        warn_of_adapter(model)
        scorer = SeparateModel(ref_model, derives_from_policy=False, ld_alpha=ld_alpha)
    reference = Remembered(scorer) if remember else scorer
    return Precomputed(reference) if precomputed else reference


def reference_from_policy(
    model: nn.Module, updates: bool, ref_adapter_name: str | None, separate: bool, ld_alpha: float | None
) -> ModelReference:
    """The table of `make_reference` without its first line."""
    if ref_adapter_name is not None:
        return NamedAdapter(model, ref_adapter_name, ld_alpha=ld_alpha)
    if separate or not is_peft(model):
        return SeparateModel(snapshot(model), derives_from_policy=True, ld_alpha=ld_alpha)
    if starts_as_identity(model) and not updates:
        return AdapterOff(model, ld_alpha=ld_alpha)
    return StartingWeights(model, ld_alpha=ld_alpha)


def warn_of_adapter(model: Any) -> None:
    """With a reference of the user's, an adapter that already acts is probably not meant."""
    if is_peft(model) and not starts_as_identity(model):
        logger.warning(
            "The policy's adapter %s already changes the model, and `ref_model` was given: at the first step the "
            "margins are zero only if `ref_model` has that adapter too. Leave `ref_model` out to train against the "
            "adapter as it is now.",
            adapter_names(model.active_adapters),
        )


def check_adapter_options(
    model: Any, ref_model: nn.Module | None, model_adapter_name: str | None, ref_adapter_name: str | None
) -> None:
    """Every adapter that is named must be there, and the reference must be named once."""
    for option, name in (("model_adapter_name", model_adapter_name), ("ref_adapter_name", ref_adapter_name)):
        if name is None:
            continue
        if not is_peft(model):
            raise ValueError(
                f"`{option}` is {name!r}, but the model has no adapters. Leave it out or give a PeftModel."
            )
        if name not in model.peft_config:
            raise ValueError(
                f"`{option}` is {name!r}, but the model's adapters are {adapter_names(model.peft_config)}. "
                "Name one of them, or load the adapter first with `model.load_adapter(path, adapter_name=...)`."
            )
    if ref_adapter_name is None:
        return
    if ref_model is not None:
        raise ValueError(f"Both `ref_model` and `ref_adapter_name` ({ref_adapter_name!r}) are given. Leave one out.")
    trained = [model_adapter_name] if model_adapter_name is not None else list(model.active_adapters)
    if ref_adapter_name in trained:
        raise ValueError(
            f"`ref_adapter_name` is {ref_adapter_name!r}, which is the adapter being trained. Load it a second time "
            "under another name, or leave `ref_adapter_name` out: the adapter as it is now is then the reference."
        )


def adapter_names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
