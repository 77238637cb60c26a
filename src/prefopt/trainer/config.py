"""The configs of the three trainers: TRL's options, order and defaults, and what prefopt adds.

Each is a ``transformers.TrainingArguments`` with other defaults: ``logging_steps`` 10, ``logging_nan_inf_filter`` off,
``gradient_checkpointing`` on, ``bf16`` on where the hardware has it, ``learning_rate`` 1e-6 (TPO 5e-7).
``docs/losses`` explains the losses, ``HELP`` in ``config_help.py`` every option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prefopt.trainer.config_base import LAYOUTS, PreferenceConfig
from prefopt.trainer.config_help import option

__all__ = ["LAYOUTS", "CPOConfig", "DPOConfig", "PreferenceConfig", "TPOConfig"]

TRUNCATION_MODES = ("keep_end", "keep_start")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(repr=False)
class DPOConfig(PreferenceConfig):
    """Options of ``DPOTrainer``.

    Example:
        >>> config = DPOConfig("out", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], report_to="none")
        >>> config.beta, config.was_set("beta"), config.objective().names
        (0.1, False, ('sigmoid', 'sft'))
    """

    METHOD: ClassVar[Literal["dpo", "cpo", "tpo"]] = "dpo"

    learning_rate: float = option("learning_rate", 1e-6)
    model_init_kwargs: dict[str, Any] | str | None = option("model_init_kwargs", None)
    trust_remote_code: bool = option("trust_remote_code", False)
    router_aux_loss_coef: float | None = option("router_aux_loss_coef", None)
    disable_dropout: bool = option("disable_dropout", True)
    dataset_num_proc: int | None = option("dataset_num_proc", None)
    max_length: int | None = option("max_length", 1024)
    truncation_mode: str = option("truncation_mode", "keep_start", choices=TRUNCATION_MODES)
    padding_free: bool = option("padding_free", False)
    pad_to_multiple_of: int | str | None = option("pad_to_multiple_of", "auto")
    precompute_ref_log_probs: bool = option("precompute_ref_log_probs", False)
    precompute_ref_batch_size: int | None = option("precompute_ref_batch_size", None)
    loss_type: list[str] | str = option("loss_type", ["sigmoid"])
    loss_weights: list[float] | None = option("loss_weights", None)
    ld_alpha: float | None = option("ld_alpha", None)
    f_divergence_type: str = option("f_divergence_type", "reverse_kl")
    f_alpha_divergence_coef: float = option("f_alpha_divergence_coef", 0.5)
    label_smoothing: float = option("label_smoothing", 0.0)
    beta: float = option("beta", 0.1)
    use_weighting: bool = option("use_weighting", False)
    discopop_tau: float = option("discopop_tau", 0.05)
    activation_offloading: bool = option("activation_offloading", False)
    sync_ref_model: bool = option("sync_ref_model", False)
    ref_model_mixup_alpha: float = option("ref_model_mixup_alpha", 0.6)
    ref_model_sync_steps: int = option("ref_model_sync_steps", 512)
    pad_token: str | None = option("pad_token", None)

    model_adapter_name: str | None = option("model_adapter_name", None)
    ref_adapter_name: str | None = option("ref_adapter_name", None)
    force_use_ref_model: bool = option("force_use_ref_model", False)
    bco_shift: bool = option("bco_shift", False)
    max_completion_length: int | None = option("max_completion_length", None, kw_only=True)
    is_encoder_decoder: bool | None = option("is_encoder_decoder", None, bare_flag=True, kw_only=True)
    generate_during_eval: bool = option("generate_during_eval", False, kw_only=True)

    def _normalise(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super()._normalise()

    def _objective_options(self) -> dict[str, Any]:
        return super()._objective_options() | {
            "f_divergence_type": self.f_divergence_type,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
            "discopop_tau": self.discopop_tau,
            "bco_shift": self.bco_shift,
        }

    def _combination_mistakes(self) -> list[str]:
        mistakes = super()._combination_mistakes()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            mistakes.append(
                "sync_ref_model=True and precompute_ref_log_probs=True: a reference that moves cannot be scored "
                "beforehand; set one of them to False"
            )
        if self.precompute_ref_log_probs and self.num_completions != 2:
            mistakes.append(
                f"precompute_ref_log_probs=True and num_completions={self.num_completions}: what is kept of a row is "
                "the log-probs of two completions; set precompute_ref_log_probs=False"
            )
        if self.ref_adapter_name is not None and self.ref_adapter_name == self.model_adapter_name:
            mistakes.append(
                f"ref_adapter_name={self.ref_adapter_name!r}: must differ from model_adapter_name, or the reference "
                "would train with the policy; load the adapter a second time under another name"
            )
        return mistakes

    def _warnings(self) -> Sequence[str]:
        found = list(super()._warnings())
        for name, default in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
            if getattr(self, name) != default and not self.sync_ref_model:
                found.append(f"{name}={getattr(self, name)} has no effect without sync_ref_model=True")
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            found.append(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} has no effect without "
                "precompute_ref_log_probs=True"
            )
        if self.pad_token is not None:
            found.append("pad_token is deprecated; set the tokenizer's pad_token and pass it as processing_class")
        return found


@dataclass(repr=False)
class CPOConfig(PreferenceConfig):
    """Options of ``CPOTrainer``: CPO, SimPO, AlphaPO.

    ``loss_type="alphapo"`` stays as it was given; its objective is simpo with no likelihood term and the alpha
    transform.

    Example:
        >>> CPOConfig("out", loss_type="simpo", cpo_alpha=0.0, beta=2.0, report_to="none").objective().needs_reference
        False
    """

    METHOD: ClassVar[Literal["dpo", "cpo", "tpo"]] = "cpo"

    learning_rate: float = option("learning_rate", 1e-6)
    max_length: int | None = option("max_length", 1024)
    max_completion_length: int | None = option("max_completion_length", None)
    beta: float = option("beta", 0.1)
    label_smoothing: float = option("label_smoothing", 0.0)
    loss_type: str | list[str] = option("loss_type", "sigmoid", several=True)
    disable_dropout: bool = option("disable_dropout", True)
    cpo_alpha: float = option("cpo_alpha", 1.0)
    simpo_gamma: float = option("simpo_gamma", 0.5)
    alpha: float = option("alpha", 0.0)
    generate_during_eval: bool = option("generate_during_eval", False)
    is_encoder_decoder: bool | None = option("is_encoder_decoder", None, bare_flag=True)
    model_init_kwargs: dict[str, Any] | str | None = option("model_init_kwargs", None)
    trust_remote_code: bool = option("trust_remote_code", False)
    dataset_num_proc: int | None = option("dataset_num_proc", None)

    truncation_mode: str = option("truncation_mode", "keep_start", choices=TRUNCATION_MODES)
    padding_free: bool = option("padding_free", False)
    pad_to_multiple_of: int | str | None = option("pad_to_multiple_of", "auto")
    activation_offloading: bool = option("activation_offloading", False)
    router_aux_loss_coef: float | None = option("router_aux_loss_coef", None)
    loss_weights: list[float] | None = option("loss_weights", None)
    use_weighting: bool = option("use_weighting", False)
    ld_alpha: float | None = option("ld_alpha", None)

    def _normalise(self) -> None:
        super()._normalise()
        self.loss_type = _single_name(self.loss_type)

    def _objective_options(self) -> dict[str, Any]:
        return super()._objective_options() | {
            "gamma": self.simpo_gamma,
            "nll_weight": self.cpo_alpha,
            "alpha": self.alpha,
        }


@dataclass(repr=False)
class TPOConfig(PreferenceConfig):
    """Options of ``TPOTrainer``.

    Example:
        >>> TPOConfig("out", tpo_alpha=0.0, report_to="none").objective().branches
        ('chosen', 'rejected')
    """

    METHOD: ClassVar[Literal["dpo", "cpo", "tpo"]] = "tpo"

    learning_rate: float = option("learning_rate", 5e-7)
    model_init_kwargs: dict[str, Any] | str | None = option("model_init_kwargs", None)
    trust_remote_code: bool = option("trust_remote_code", False)
    disable_dropout: bool = option("disable_dropout", True)
    dataset_num_proc: int | None = option("dataset_num_proc", None)
    max_length: int | None = option("max_length", 1024)
    truncation_mode: str = option("truncation_mode", "keep_start", choices=TRUNCATION_MODES)
    pad_to_multiple_of: int | str | None = option("pad_to_multiple_of", None)
    loss_type: str | list[str] = option("loss_type", "sigmoid", several=True)
    beta: float = option("beta", 0.01)
    label_smoothing: float = option("label_smoothing", 0.0)
    tpo_alpha: float = option("tpo_alpha", 1.0)
    tpo_l_gamma: float = option("tpo_l_gamma", 0.5)

    padding_free: bool = option("padding_free", False)
    activation_offloading: bool = option("activation_offloading", False)
    router_aux_loss_coef: float | None = option("router_aux_loss_coef", None)
    loss_weights: list[float] | None = option("loss_weights", None)
    use_weighting: bool = option("use_weighting", False)
    ld_alpha: float | None = option("ld_alpha", None)
    max_completion_length: int | None = option("max_completion_length", None, kw_only=True)
    is_encoder_decoder: bool | None = option("is_encoder_decoder", None, bare_flag=True, kw_only=True)
    generate_during_eval: bool = option("generate_during_eval", False, kw_only=True)

    def _normalise(self) -> None:
        super()._normalise()
        self.loss_type = _single_name(self.loss_type)

    def _objective_options(self) -> dict[str, Any]:
        return super()._objective_options() | {"gamma": self.tpo_l_gamma, "nll_weight": self.tpo_alpha}


def _single_name(loss_type: str | list[str]) -> str | list[str]:
    """A list of one name as the name, which is what TRL's option is."""
    if isinstance(loss_type, list) and len(loss_type) == 1:
        return loss_type[0]
    return loss_type
