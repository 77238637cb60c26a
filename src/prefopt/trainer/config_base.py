"""What the configs of the three trainers share."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from transformers import TrainingArguments

from prefopt.trainer.config_help import option
from prefopt.trainer.config_rules import (
    budget_warnings,
    ddp_warnings,
    metrics_mistakes,
    optimizer_mistakes,
    parse_json_options,
    rule_mistakes,
)
from prefopt.trainer.given import Given, fresh_names
from prefopt.trainer.kernels import kernel_warnings
from prefopt.trainer.precision import resolve_precision
from prefopt.trainer.saving.masking import without_secrets
from prefopt.trainer.versions import CHECKPOINTING_NAMES, unify_checkpointing

if TYPE_CHECKING:
    from prefopt.objective import Objective

__all__ = ["LAYOUTS", "PreferenceConfig"]

logger = logging.getLogger(__name__)

OF_THE_REFERENCE = frozenset(
    {
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "ref_adapter_name",
        "force_use_ref_model",
    }
)
"""Options of DPO that other methods cannot have."""
LAYOUTS = ("auto", "shared_prompt", "packed", "padded")


@dataclass(repr=False)
class PreferenceConfig(TrainingArguments):
    """Base of ``DPOConfig``, ``CPOConfig`` and ``TPOConfig``: checks, and the options that TRL has in none of them.

    Everything is checked when a config is made; all mistakes come in one ``ValueError``, each with the option, its
    value, the rule and what to set instead. An option that is set but that the chosen losses do not use gets a
    warning. ``was_set`` tells what the user set from what is a default.
    """

    METHOD: ClassVar[Literal["dpo", "cpo", "tpo"]]
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    logging_steps: float = option("logging_steps", 10)
    logging_nan_inf_filter: bool = option("logging_nan_inf_filter", False)
    gradient_checkpointing: bool = option("gradient_checkpointing", True)
    bf16: bool | None = option("bf16", None, bare_flag=True)
    lr_scheduler_kwargs: dict[str, Any] | str | None = option("lr_scheduler_kwargs", None)

    # Keyword-only, so that the parameters that TRL has keep TRL's order.
    layout: str = option("layout", "auto", choices=LAYOUTS, kw_only=True)
    tokens_per_batch: int | None = option("tokens_per_batch", None, kw_only=True)
    num_completions: int = option("num_completions", 2, kw_only=True)
    ranking: str = option("ranking", "all_pairs", choices=("all_pairs", "plackett_luce"), kw_only=True)
    on_bad_row: str = option("on_bad_row", "skip", choices=("skip", "error"), kw_only=True)
    image_roots: list[str] | None = option("image_roots", None, kw_only=True)
    on_nonfinite: str = option("on_nonfinite", "stop", choices=("stop", "skip"), kw_only=True)
    allow_changes: bool = option("allow_changes", False, kw_only=True)
    full_logits_for_metrics: bool = option("full_logits_for_metrics", False, kw_only=True)
    num_eval_samples: int = option("num_eval_samples", 4, kw_only=True)
    eval_sample_tokens: int | None = option("eval_sample_tokens", None, kw_only=True)
    user_set: tuple[str, ...] | None = option("user_set", None, kw_only=True)

    if TYPE_CHECKING:
        # Every config declares these itself, each in TRL's order for that config.
        loss_type: str | list[str] = "sigmoid"
        loss_weights: list[float] | None = None
        beta: float = 0.1
        label_smoothing: float = 0.0
        ld_alpha: float | None = None
        use_weighting: bool = False
        model_init_kwargs: dict[str, Any] | str | None = None
        trust_remote_code: bool = False
        router_aux_loss_coef: float | None = None
        disable_dropout: bool = True
        dataset_num_proc: int | None = None
        max_length: int | None = 1024
        max_completion_length: int | None = None
        is_encoder_decoder: bool | None = None
        truncation_mode: str = "keep_start"
        padding_free: bool = False
        pad_to_multiple_of: int | str | None = "auto"
        activation_offloading: bool = False
        generate_during_eval: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_names(cls, kwargs)
        config = super().__new__(cls)
        positional = [spec.name for spec in fields(cls) if spec.init and not spec.kw_only]
        if args or kwargs:  # copying and unpickling come without
            config.__dict__["_passed"] = {**dict(zip(positional, args, strict=False)), **kwargs}
        return config

    def __post_init__(self) -> None:
        fresh = fresh_names(self.__dict__.pop("_passed", {}))
        mistakes = parse_json_options(self, self._VALID_DICT_FIELDS)
        mistakes += unify_checkpointing(self, fresh)
        self._normalise()
        resolve_precision(self)
        mistakes += rule_mistakes(self)
        mistakes += self._parent_mistakes(bool(mistakes))
        self._record({*fresh, *(self.user_set or ())})
        mistakes += self._combination_mistakes()
        mistakes += self._objective_mistakes()
        if mistakes:
            raise ValueError(_message(type(self).__name__, mistakes))
        for text in self._warnings():
            warnings.warn(f"{type(self).__name__}: {text}", UserWarning, stacklevel=3)

    def check(self) -> None:
        """Check the options as they are now, after some were assigned.

        Raises:
            ValueError: with every mistake in them.
        """
        self._normalise()
        mistakes = [*rule_mistakes(self), *self._combination_mistakes(), *self._objective_mistakes()]
        if mistakes:
            raise ValueError(_message(type(self).__name__, mistakes))

    def was_set(self, name: str) -> bool:
        """Whether the user set the option, in the constructor, on the command line, in YAML or by assignment."""
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}")
        record = self.user_set
        if name in (record or ()):
            return True
        made = getattr(record, "as_made", {})
        return name in made and getattr(self, name) != made[name]

    def decide(self, **values: Any) -> None:
        """Give options that the user left open the values that a run found out; `was_set` goes on to say so."""
        for name, value in values.items():
            setattr(self, name, value)
        getattr(self.user_set, "as_made", {}).update(values)

    @property
    def batch_layout(self) -> str:
        """The layout asked for: ``layout`` where it was set, else ``packed`` for TRL's ``padding_free=True``."""
        if self.padding_free and not self.was_set("layout"):
            return "packed"
        return self.layout

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names in ``loss_type``, one or several."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def objective(self) -> Objective:
        """The objective that these options describe."""
        from prefopt.objective import build_objective

        return build_objective(self.METHOD, **self._objective_options())

    def to_dict(self) -> dict[str, Any]:
        """The options by name, JSON-ready; the config itself stays as it is. Secrets are masked, at every depth."""
        plain = copy.copy(self)
        plain.model_init_kwargs = copy.deepcopy(self.model_init_kwargs)  # transformers rewrites nested values in place
        values = super(PreferenceConfig, plain).to_dict()
        if "pad_token" in values:
            values["pad_token"] = getattr(self, "pad_token", None)  # masked by transformers for its name's sake
        values["user_set"] = list(self.user_set or ())
        return {name: without_secrets(value, name.removesuffix("_token")) for name, value in values.items()}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __repr__ = __str__

    def _objective_options(self) -> dict[str, Any]:
        """Keyword arguments of ``build_objective``, under the core's names."""
        return {
            "loss_type": self.loss_type,
            "loss_weights": self.loss_weights,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
            "num_completions": self.num_completions,
            "ranking": self.ranking,
        }

    def _normalise(self) -> None:
        """Brings values that may be written in several ways into one form."""
        if isinstance(self.loss_type, tuple):
            self.loss_type = list(self.loss_type)
        if isinstance(self.loss_weights, tuple):
            self.loss_weights = list(self.loss_weights)
        multiple = self.pad_to_multiple_of
        if isinstance(multiple, str) and multiple.lower() in ("none", "null"):
            self.pad_to_multiple_of = None
        elif isinstance(multiple, str) and multiple.isdecimal():
            self.pad_to_multiple_of = int(multiple)
        elif multiple == "auto":  # Neuron compiles once per shape
            self.pad_to_multiple_of = 128 if _on_neuron() else None

    def _parent_mistakes(self, has_others: bool) -> list[str]:
        """Runs the checks of transformers, which stop at their first mistake."""
        try:
            super().__post_init__()
        except ValueError as error:
            return [str(error)]
        except TypeError:
            if not has_others:  # else a mistake already named is its cause
                raise
        return []

    def _record(self, names: set[str]) -> None:
        for pair in CHECKPOINTING_NAMES:
            if names & set(pair):
                names |= {name for name in pair if hasattr(self, name)}
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "user_set"}
        self.user_set = Given.of(names, values)

    def _combination_mistakes(self) -> list[str]:
        """Mistakes that lie in how options go with each other, or with the loop."""
        return optimizer_mistakes(self)

    def _objective_mistakes(self) -> list[str]:
        from prefopt.objective import objective_mistakes

        mistakes = objective_mistakes(self.METHOD, **self._objective_options())
        return mistakes or metrics_mistakes(self)

    def _warnings(self) -> Sequence[str]:
        """Options that were set and have no effect."""
        from prefopt.objective import objective_warnings

        found = objective_warnings(self.METHOD, **self._objective_options())
        if self.padding_free and self.batch_layout != "packed":
            found.append(f"padding_free=True has no effect beside the explicit layout={self.layout!r}")
        if self.pad_to_multiple_of is not None and self.batch_layout in ("packed", "shared_prompt"):
            found.append(
                f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect in layout {self.batch_layout!r}, "
                "which does not pad; set layout='padded' to have it"
            )
        if self.activation_offloading and not _on_accelerator(self):
            found.append(
                "activation_offloading=True has no effect on a CPU, where activations are in its memory already"
            )
        for name in () if self.generate_during_eval else ("num_eval_samples", "eval_sample_tokens"):
            if self.was_set(name):
                found.append(f"{name}={getattr(self, name)} has no effect without generate_during_eval=True")
        if self.logging_nan_inf_filter:
            found.append("logging_nan_inf_filter=True has no effect: a NaN is shown as NaN; see on_nonfinite")
        if self.label_smoothing_factor:
            found.append(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect: it belongs to next-token "
                "training; set label_smoothing"
            )
        return [*found, *budget_warnings(self), *ddp_warnings(self), *kernel_warnings(self)]


def check_names(kind: type[PreferenceConfig], given: Collection[str]) -> None:
    """Options must be those of the method; one that is about a reference gets the reason where there is none.

    Raises:
        TypeError: naming the first that is not.
    """
    for name in given:
        if name in kind.__dataclass_fields__:
            continue
        reason = ""
        if name in OF_THE_REFERENCE:
            reason = f": {kind.METHOD.upper()} compares with no reference, so there is nothing for it to act on"
        raise TypeError(f"{kind.__name__}() got an unexpected keyword argument {name!r}{reason}")


def _message(name: str, mistakes: Sequence[str]) -> str:
    if len(mistakes) == 1:
        return f"{name}: {mistakes[0]}"
    return "\n".join([f"{name}: {len(mistakes)} options are wrong", *(f"- {mistake}" for mistake in mistakes)])


def _on_neuron() -> bool:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == "neuron"


def _on_accelerator(config: TrainingArguments) -> bool:
    import torch

    return not config.use_cpu and torch.accelerator.is_available()
