"""The rules that option values keep, each in one place, and the message for a value that breaks one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

__all__ = [
    "RULES",
    "Rule",
    "budget_warnings",
    "ddp_warnings",
    "metrics_mistakes",
    "optimizer_mistakes",
    "parse_json_options",
    "rule_mistakes",
]


@dataclass(frozen=True)
class Rule:
    """``accepts(value)`` decides, ``must`` says the rule in words, ``instead`` what to set."""

    accepts: Callable[[Any], bool]
    must: str
    instead: str

    def mistake(self, name: str, value: Any) -> str:
        return f"{name}={value!r}: must be {self.must}; {self.instead}"


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(least: float = -math.inf, most: float = math.inf) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        return math.isfinite(number := float(value)) and least <= number <= most

    return accepts


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _flag(default: bool) -> Rule:
    return Rule(lambda value: isinstance(value, bool), "True or False", f"the default is {default}")


_BATCH = Rule(_whole(1), "a whole number of at least 1", "set e.g. 8, or 1 where memory is short")
_NOT_NEGATIVE = Rule(_number(0), "a finite number of at least 0", "set 0 to turn it off")
_ADAPTER = Rule(_or_none(_is_text), "the name of an adapter, or None", "see model.peft_config for the names")
_MAPPING = Rule(_or_none(lambda value: isinstance(value, dict)), "a dict, or JSON for one", "set e.g. '{\"key\": 1}'")

RULES: dict[str, Rule] = {
    "learning_rate": Rule(_number(0), "a finite number of at least 0", "set e.g. 1e-6"),
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": Rule(_or_none(_number(0)), "a finite number of at least 0", "set 0 to clip nothing"),
    "num_train_epochs": Rule(_number(0), "a finite number of at least 0", "set e.g. 1"),
    "max_steps": Rule(_whole(-1), "a whole number of at least -1", "set -1 to let num_train_epochs decide"),
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": _BATCH,
    "gradient_accumulation_steps": Rule(_whole(1), "a whole number of at least 1", "set 1 for no accumulation"),
    "model_init_kwargs": _MAPPING,
    "lr_scheduler_kwargs": _MAPPING,
    "gradient_checkpointing_kwargs": _MAPPING,
    "router_aux_loss_coef": Rule(
        _or_none(_number(0)),
        "a finite number of at least 0, or None",
        "set 0 for no load-balancing loss, None for the model config's value",
    ),
    "dataset_num_proc": Rule(_or_none(_whole(1)), "a whole number of at least 1, or None", "set None for no workers"),
    "max_length": Rule(_or_none(_whole(2)), "a whole number of at least 2, or None", "set None to cut nothing"),
    "max_completion_length": Rule(
        _or_none(_whole(1)), "a whole number of at least 1, or None", "set None for the default of 128"
    ),
    "pad_to_multiple_of": Rule(
        _or_none(_whole(1)), "a whole number of at least 1, 'auto' or None", "set None to pad to the longest row"
    ),
    "tokens_per_batch": Rule(
        _or_none(_whole(1)), "a whole number of at least 1, or None", "set None for micro-batches by number of pairs"
    ),
    "num_eval_samples": Rule(_whole(1), "a whole number of at least 1", "set e.g. 4"),
    "eval_sample_tokens": Rule(
        _or_none(_whole(1)), "a whole number of at least 1, or None", "set None for max_completion_length, or 128"
    ),
    "precompute_ref_batch_size": Rule(
        _or_none(_whole(1)), "a whole number of at least 1, or None", "set None for the per-device batch size"
    ),
    "ref_model_mixup_alpha": Rule(_number(0, 1), "a number from 0 to 1", "set e.g. 0.6"),
    "ref_model_sync_steps": Rule(_whole(1), "a whole number of at least 1", "set e.g. 512"),
    "model_adapter_name": _ADAPTER,
    "ref_adapter_name": _ADAPTER,
    "pad_token": Rule(_or_none(_is_text), "a token of the vocabulary, or None", "set None for the tokenizer's own"),
    "is_encoder_decoder": Rule(
        lambda value: value is None or isinstance(value, bool), "True, False or None", "set None with a loaded model"
    ),
}


def rule_mistakes(config: Any) -> list[str]:
    """One line for each option whose value breaks its rule: type, range or list of choices."""
    mistakes = []
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        rule = RULES.get(spec.name) or _rule_of_field(spec)
        if rule is not None and not rule.accepts(value):
            mistakes.append(rule.mistake(spec.name, value))
    return mistakes


def _rule_of_field(spec: dataclasses.Field[Any]) -> Rule | None:
    """The rule that a field's own declaration states: a bool is a bool, a choice one of the choices."""
    choices = spec.metadata.get("choices")
    if choices is not None:
        allowed = [spec.default, *choices]
        must = "one of " + ", ".join(map(repr, choices))
        return Rule(lambda value: value in allowed, must, f"the default is {spec.default!r}")
    if isinstance(spec.default, bool) and spec.type in ("bool", bool):
        return _flag(spec.default)
    return None


def optimizer_mistakes(config: Any) -> list[str]:
    """Optimizers that move a weight as soon as its gradient is there."""
    name = str(getattr(config.optim, "value", config.optim))
    if "lomo" not in name and not name.endswith("_layerwise"):
        return []
    return [
        f"optim={name!r}: it moves the weights within the backward pass, for each micro-batch, before anyone can say "
        "whether the step is finite; a step of several micro-batches would be several steps. Set 'adafactor' or "
        "'adamw_8bit', which need little memory too, or another"
    ]


def metrics_mistakes(config: Any) -> list[str]:
    """What ``include_for_metrics`` asks for and a pair does not have."""
    wanted = config.include_for_metrics
    mistakes = [
        f"include_for_metrics={wanted}: {name!r} is none of 'inputs' (the row number of a pair) and 'loss' (its loss)"
        for name in wanted
        if name not in ("inputs", "loss")
    ]
    losses = config.objective().sorted_losses if "loss" in wanted else ()
    return mistakes + [
        f"include_for_metrics={wanted}: {name} is a function of many pairs at once, so one has no loss of its own; "
        "leave 'loss' out"
        for name in losses
    ]


def ddp_warnings(config: Any) -> list[str]:
    """What DDP is told by the run itself."""
    if not config.ddp_static_graph:
        return []
    return [
        "ddp_static_graph=True has no effect: micro-batches differ from step to step, and which weights are used is "
        "found out once, before training"
    ]


def budget_warnings(config: Any) -> list[str]:
    """What options about the size of micro-batches do that their user may not expect."""
    budget, found = config.tokens_per_batch, []
    if budget is not None and config.max_length is not None and budget < config.max_length:
        found.append(
            f"tokens_per_batch={budget} is below max_length={config.max_length}: a pair with so long a sequence does "
            "not fit and is a micro-batch of its own, above the budget"
        )
    if config.auto_find_batch_size:
        found.append(
            "auto_find_batch_size=True acts only where ranks divide the model (FSDP, DeepSpeed), and makes the step "
            "smaller; elsewhere micro-batches become smaller by themselves where memory runs out, and the step stays"
        )
    return found


def parse_json_options(config: Any, names: list[str]) -> list[str]:
    """Turns JSON strings into dicts in place; returns the mistakes. A string that is no JSON object is left alone."""
    mistakes = []
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, str) and value.lstrip().startswith("{")):
            continue
        try:
            setattr(config, name, json.loads(value))
        except json.JSONDecodeError as error:
            mistakes.append(f"{name}={value!r}: is not valid JSON ({error}); set e.g. '{{\"key\": 1}}'")
            setattr(config, name, None)
    return mistakes
