"""Adapters of a run: made, put one on another, and what their kinds need in training."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.utils.import_utils import is_peft_available

from prefopt.reference.adapters import acts_at_the_start, adapter_modules, adapter_parameters, is_peft
from prefopt.scoring.forward import innermost
from prefopt.trainer.versions import chosen_checkpointing
from prefopt.types import LossTerm, LossTerms

__all__ = [
    "AllocateRanks",
    "can_recompute",
    "check_adapter",
    "keep_differentiable",
    "ready_for_adapter",
    "refuse_frozen",
    "regularised",
    "warn_of_acting",
    "without_their_warnings",
    "wrap_with_adapter",
]

logger = logging.getLogger(__name__)

CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's names for adapters that give every layer keys and values."""


def wrap_with_adapter(model: Any, peft_config: Any, args: Any) -> Any:
    """The model with a new adapter of ``peft_config``; adapters it has already stay active and are not trained.

    Args:
        model: a ``PreTrainedModel`` or a ``PeftModel``.
        peft_config: the kind of adapter.
        args: the config of the run; its seed decides the adapter's random weights.

    Raises:
        ImportError: without peft.
        TypeError: if ``peft_config`` is no ``peft.PeftConfig``.
        ValueError: if the new adapter cannot act together with those the model has.
    """
    if not is_peft_available():
        raise ImportError("`peft_config` needs the package peft: pip install 'prefopt[peft]'.")
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, not {type(peft_config).__name__}.")
    set_seed(args.seed)  # the adapter's random weights depend on the seed alone, not on what ran before
    if isinstance(model, PeftModel):
        return stacked_adapter(model, peft_config)
    model = ready_for_adapter(model)
    with without_their_warnings():
        return get_peft_model(model, peft_config)


@contextmanager
def without_their_warnings() -> Iterator[None]:
    """peft 0.21 asks for checkpointing by the name that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def warn_of_acting(model: Any, peft_config: Any) -> None:
    """A new adapter that is no identity makes another model of what it was put on, or is a part of it."""
    if acts_at_the_start(model):
        logger.warning(
            "The new adapter (%s%s) is no identity before the first step: the model without it is another one. A "
            "reference that is taken from the policy is the model with the adapter as it begins, so the first margins "
            "are zero; a `ref_model` of yours is not.",
            peft_config.peft_type.value,
            f", init_lora_weights={made!r}"
            if (made := getattr(peft_config, "init_lora_weights", None)) is not None
            else "",
        )


def ready_for_adapter(model: Any) -> Any:
    """A model in 4 or 8 bits with what is not quantised in float32, and frozen; any other as it is."""
    if not (getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)):
        return model
    from peft import prepare_model_for_kbit_training

    # activation checkpointing is decided later; reentrant, it needs inputs that take a gradient
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    return model


def stacked_adapter(model: Any, peft_config: Any) -> Any:
    """A PeftModel with one more adapter, the only one that is trained, acting together with those that were active."""
    kinds = {config.peft_type for config in model.peft_config.values()} | {peft_config.peft_type}
    if peft_config.is_prompt_learning or len(kinds) > 1:
        raise ValueError(
            f"The model has adapters already, and one of type {peft_config.peft_type.value} cannot act together with "
            f"them (types: {', '.join(sorted(kind.value for kind in kinds))}). Call `merge_and_unload()` on the model "
            "first, or leave `peft_config` out to train its own adapter."
        )
    before = list(model.active_adapters)
    name = "preference"
    while name in model.peft_config:
        name += "_"
    model.add_adapter(name, peft_config)
    try:
        model.base_model.set_adapter([*before, name])
    except ValueError as error:  # what PEFT says when two adapters replace one module
        raise ValueError(
            f"`peft_config` trains a copy of a module of which the adapter {', '.join(map(repr, before))} has one "
            f"already (modules_to_save={peft_config.modules_to_save}): only one of the two can stand in its place. "
            "Call `merge_and_unload()` on the model first, or leave the module out."
        ) from error
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)  # also the biases, as the config says
    for _, module in adapter_modules(model):
        for parameter in adapter_parameters(module, before):
            parameter.requires_grad_(False)
    return model


class AllocateRanks(TrainerCallback):
    """AdaLoRA's budget: after each optimizer step the ranks go to the layers that need them.

    Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023,
    https://arxiv.org/abs/2303.10512.
    """

    @staticmethod
    def is_needed(model: Any) -> bool:
        """Whether the model has an adapter whose ranks are allocated."""
        return is_peft(model) and hasattr(model.base_model, "update_and_allocate")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = extract_model_from_parallel(kwargs["model"])
        model.base_model.update_and_allocate(state.global_step + 1)  # the gradients are still there


def regularised(terms: LossTerms, model: Any) -> LossTerms:
    r"""The terms of a micro-batch with AdaLoRA's regulariser, where the model has such an adapter.

    .. math:: \gamma \; \mathrm{mean}_{P, Q} \left( \|P^T P - I\|_F, \|Q Q^T - I\|_F \right)

    Without it the factors are no singular vectors, and the sizes that the budget goes by mean nothing.

    Args:
        terms: what the objective made of the micro-batch.
        model: the policy, bare.
    """
    if not AllocateRanks.is_needed(model):
        return terms
    name = model.base_model.trainable_adapter_name
    layers: list[Any] = [module for _, module in adapter_modules(model) if name in getattr(module, "lora_E", ())]
    factors = [rows for layer in layers for rows in (layer.lora_A[name], layer.lora_B[name].T)]
    distances = torch.stack([from_orthonormal(rows) for rows in factors])
    weight = model.peft_config[name].orth_reg_weight
    term = LossTerm("orthogonality", distances.mean(), unit="micro_batch", weight=weight)
    return replace(terms, terms=(*terms.terms, term))


def from_orthonormal(rows: Tensor) -> Tensor:
    """[] Frobenius norm of ``rows`` [r, n] times their transpose, less the identity."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def check_adapter(model: Any, args: Any) -> None:
    """What an adapter does not go with.

    Raises:
        ValueError: activation checkpointing was asked for, and the adapter is a cache; or the adapter mixes the
            sequences of a batch.
    """
    kinds = {str(config.peft_type.value): name for name, config in getattr(model, "peft_config", {}).items()}
    if "LILY" in kinds:
        raise ValueError(
            f"The adapter {kinds['LILY']!r} is Lily, whose routers average over all tokens of a batch, padding too: "
            "what it gives a completion depends on the rows beside it, so there is no log p(y | x) to train. Take "
            "another kind of adapter."
        )
    if prefix_adapters(model) and chosen_checkpointing(args):
        raise ValueError(
            f"gradient_checkpointing=True: the adapter {', '.join(prefix_adapters(model))} is a cache of keys and "
            "values before every sequence, to which a layer adds as it computes; a layer that computes twice would add "
            "twice. Leave the option out or set it to False."
        )


def keep_differentiable(model: Any) -> None:
    """Takes merged adapters out of the weights again, and lets 4-bit layers of bitsandbytes keep what has a gradient.

    On some CPUs a pass in evaluation mode packs the weights for a kernel that has none, and they stay packed: in the
    training steps after it everything below such a layer would get no gradient, without an error.
    """
    if is_peft(model) and any(getattr(module, "merged", False) for _, module in adapter_modules(model)):
        model.base_model.unmerge_adapter()
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # unpacks them


def refuse_frozen(model: nn.Module) -> None:
    """Raises: ValueError if no weight of the model is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No weight of the model is trainable. An adapter from a folder is loaded to be trained with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, or by giving its folder as `model`; a new "
            "one comes with `peft_config`; a whole model is trained after `model.requires_grad_(True)`."
        )


def can_recompute(model: Any) -> bool:
    """Whether layers may compute their activations a second time."""
    return innermost(model).supports_gradient_checkpointing and not prefix_adapters(model)


def prefix_adapters(model: Any) -> list[str]:
    """The names of adapters that are caches of keys and values."""
    return [repr(name) for name, config in getattr(model, "peft_config", {}).items() if config.peft_type in CACHES]
