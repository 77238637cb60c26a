"""The configs: TRL's options and defaults, every rule, what the user set, precision, round trips."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import warnings
from typing import Any

import pytest

from prefopt.trainer import precision
from prefopt.trainer.config import CPOConfig, DPOConfig, PreferenceConfig, TPOConfig

CONFIGS = (DPOConfig, CPOConfig, TPOConfig)

INTENDED = {
    # NaN in the log is information, and hiding it costs a synchronisation per micro-batch
    "logging_nan_inf_filter": False,
}
"""Defaults that differ from TRL's on purpose."""


@pytest.fixture(autouse=True)
def quiet_precision_line() -> None:
    precision._say_float32.cache_clear()


def make(config: type[PreferenceConfig], **options: Any) -> PreferenceConfig:
    return config("out", report_to="none", **options)


def mistakes_of(config: type[PreferenceConfig], **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make(config, **options)
    return str(caught.value)


def warnings_of(config: type[PreferenceConfig], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(config, **options)
    return [str(item.message) for item in caught]


def trl_config(name: str) -> type:
    pytest.importorskip("trl", reason="compares with TRL 1.16")
    if name == "DPOConfig":
        from trl import DPOConfig as config
    elif name == "CPOConfig":
        from trl.experimental.cpo import CPOConfig as config
    else:
        from trl.experimental.tpo import TPOConfig as config
    return config


def default_of(spec: dataclasses.Field[Any]) -> Any:
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


# TRL's surface


@pytest.mark.trl
@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_are_trls(config):
    ours = {spec.name: default_of(spec) for spec in dataclasses.fields(config)}
    theirs = {spec.name: default_of(spec) for spec in dataclasses.fields(trl_config(config.__name__))}
    assert {name: ours[name] for name in theirs} == theirs | INTENDED


@pytest.mark.trl
@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_stand_in_trls_order(config):
    theirs = list(inspect.signature(trl_config(config.__name__)).parameters)
    assert list(inspect.signature(config).parameters)[: len(theirs)] == theirs


@pytest.mark.parametrize("config", CONFIGS)
def test_what_one_trainer_has_the_others_have(config):
    shared = {"truncation_mode", "padding_free", "pad_to_multiple_of", "activation_offloading", "router_aux_loss_coef"}
    shared |= {"loss_weights", "use_weighting", "ld_alpha", "layout", "on_bad_row", "on_nonfinite"}
    shared |= {"full_logits_for_metrics"}
    assert shared <= {spec.name for spec in dataclasses.fields(config)}


@pytest.mark.parametrize("config", CONFIGS)
def test_changed_defaults_of_transformers(config):
    made = make(config)
    assert (made.logging_steps, made.logging_nan_inf_filter, made.gradient_checkpointing) == (10, False, True)
    assert made.learning_rate == (5e-7 if config is TPOConfig else 1e-6)


def test_loss_type_has_the_form_of_each_trainer():
    assert make(DPOConfig, loss_type="hinge").loss_type == ["hinge"]
    assert make(CPOConfig, loss_type=["simpo"]).loss_type == "simpo"
    assert make(TPOConfig, loss_type=("ipo", "hinge")).loss_type == ["ipo", "hinge"]
    assert make(CPOConfig, loss_type="alphapo", alpha=0.25).loss_type == "alphapo"


def test_default_list_is_not_shared():
    make(DPOConfig).loss_type.append("sft")
    assert make(DPOConfig).loss_type == ["sigmoid"]


# Rules

BROKEN: list[tuple[type[PreferenceConfig], str, Any]] = [
    (DPOConfig, "learning_rate", -1.0),
    (DPOConfig, "learning_rate", "1e-6"),
    (DPOConfig, "learning_rate", float("nan")),
    (DPOConfig, "weight_decay", float("inf")),
    (DPOConfig, "max_grad_norm", -1.0),
    (DPOConfig, "num_train_epochs", -1),
    (DPOConfig, "max_steps", 1.5),
    (DPOConfig, "per_device_train_batch_size", 0),
    (DPOConfig, "per_device_eval_batch_size", True),
    (DPOConfig, "gradient_accumulation_steps", 0),
    (DPOConfig, "model_init_kwargs", "not json"),
    (DPOConfig, "model_init_kwargs", '{"a": '),
    (DPOConfig, "lr_scheduler_kwargs", [1]),
    (DPOConfig, "gradient_checkpointing_kwargs", "reentrant"),
    (TPOConfig, "router_aux_loss_coef", -0.1),
    (CPOConfig, "dataset_num_proc", 0),
    (DPOConfig, "max_length", 1),
    (CPOConfig, "max_length", 512.0),
    (CPOConfig, "max_completion_length", 0),
    (TPOConfig, "pad_to_multiple_of", 0),
    (DPOConfig, "pad_to_multiple_of", "eight"),
    (DPOConfig, "precompute_ref_batch_size", 0),
    (DPOConfig, "ref_model_mixup_alpha", 1.1),
    (DPOConfig, "ref_model_sync_steps", 0),
    (DPOConfig, "model_adapter_name", ""),
    (DPOConfig, "ref_adapter_name", 1),
    (DPOConfig, "pad_token", 7),
    (CPOConfig, "is_encoder_decoder", "no"),
    (DPOConfig, "disable_dropout", "false"),
    (TPOConfig, "use_weighting", 1),
    (DPOConfig, "truncation_mode", "middle"),
    (CPOConfig, "layout", "flat"),
    (TPOConfig, "on_bad_row", "ignore"),
    (DPOConfig, "on_nonfinite", "continue"),
    (DPOConfig, "beta", 0.0),
    (DPOConfig, "beta", "0.1"),
    (CPOConfig, "beta", -1.0),
    (TPOConfig, "beta", float("inf")),
    (DPOConfig, "label_smoothing", 0.6),
    (DPOConfig, "ld_alpha", 7.0),
    (DPOConfig, "discopop_tau", 0.0),
    (DPOConfig, "f_divergence_type", "chi2"),
    (DPOConfig, "loss_weights", [1.0, 2.0]),
    (CPOConfig, "cpo_alpha", float("nan")),
    (CPOConfig, "simpo_gamma", "half"),
    (TPOConfig, "tpo_alpha", float("nan")),
    (TPOConfig, "tpo_l_gamma", None),
]


@pytest.mark.parametrize(("config", "option", "value"), BROKEN, ids=lambda item: getattr(item, "__name__", repr(item)))
def test_a_broken_rule_names_option_and_value(config, option, value):
    message = mistakes_of(config, **{option: value})
    assert f"{option}={value!r}" in message
    assert message.startswith(config.__name__)


@pytest.mark.parametrize("config", CONFIGS)
def test_unknown_loss_is_named(config):
    assert "'sigmod'" in mistakes_of(config, loss_type="sigmod")


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0, "max_grad_norm": 0, "weight_decay": 0, "num_train_epochs": 0, "max_steps": -1},
        {"max_length": None, "dataset_num_proc": None, "router_aux_loss_coef": 0, "ld_alpha": 0},
        {"max_length": 2, "dataset_num_proc": 1, "router_aux_loss_coef": None, "ld_alpha": 1.0},
        {"label_smoothing": 0.5, "pad_to_multiple_of": 1, "lr_scheduler_kwargs": "{}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_ends_of_the_ranges_are_allowed(config, options):
    made = make(config, **options)
    assert made.max_length == options.get("max_length", 1024)


def test_all_mistakes_come_at_once():
    message = mistakes_of(
        DPOConfig, beta=-1.0, max_length=0, layout="flat", eval_strategy="sometimes", loss_type="sigmod"
    )
    for part in ("beta=-1.0", "max_length=0", "layout='flat'", "sometimes", "'sigmod'"):
        assert part in message
    assert "5 options are wrong" in message


def test_a_mistake_of_transformers_is_one_of_ours():
    assert "fp16 and bf16" in mistakes_of(DPOConfig, fp16=True, bf16=True)


def test_wrong_type_that_transformers_stumbles_over_is_named():
    assert "max_grad_norm='x'" in mistakes_of(DPOConfig, max_grad_norm="x", logging_steps="y")


def test_moving_and_precomputed_reference_exclude_each_other():
    message = mistakes_of(DPOConfig, sync_ref_model=True, precompute_ref_log_probs=True)
    assert "sync_ref_model=True" in message
    assert "precompute_ref_log_probs=True" in message


def test_one_adapter_cannot_be_policy_and_reference():
    assert "must differ" in mistakes_of(DPOConfig, model_adapter_name="a", ref_adapter_name="a")
    assert make(DPOConfig, model_adapter_name="a", ref_adapter_name="b").ref_adapter_name == "b"


def test_generation_during_evaluation_is_refused_until_it_works():
    assert "generate_during_eval=True: not available yet" in mistakes_of(CPOConfig, generate_during_eval=True)


def test_activation_offloading_is_refused_on_an_accelerator_only(monkeypatch):
    assert make(DPOConfig, activation_offloading=True, use_cpu=True).activation_offloading
    monkeypatch.setattr("prefopt.trainer.config_base._on_accelerator", lambda config: True)
    assert "activation_offloading=True: not available yet" in mistakes_of(DPOConfig, activation_offloading=True)


# Options without effect


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        (DPOConfig, {"discopop_tau": 0.1}, "discopop_tau=0.1"),
        (DPOConfig, {"ref_model_sync_steps": 64}, "ref_model_sync_steps=64 has no effect"),
        (DPOConfig, {"precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4 has no effect"),
        (DPOConfig, {"padding_free": True, "layout": "padded"}, "padding_free=True has no effect"),
        (DPOConfig, {"pad_to_multiple_of": 8, "layout": "packed"}, "pad_to_multiple_of=8 has no effect"),
        (DPOConfig, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
        (DPOConfig, {"pad_token": "<pad>"}, "pad_token is deprecated"),
        (CPOConfig, {"simpo_gamma": 1.0}, "simpo_gamma=1.0"),
        (TPOConfig, {"tpo_l_gamma": 1.0}, "tpo_l_gamma=1.0"),
    ],
)
def test_an_option_without_effect_gets_a_warning(config, options, part):
    found = warnings_of(config, **options)
    assert len(found) == 1
    assert part in found[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_and_checkpointing_give_no_warning(config):
    assert warnings_of(config) == []
    assert (
        warnings_of(config, gradient_checkpointing=False, gradient_checkpointing_kwargs={"use_reentrant": False}) == []
    )


# Objective


def test_dpo_options_reach_the_objective():
    objective = make(DPOConfig, loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.2], ld_alpha=0.5).objective()
    assert objective.names == ("sigmoid", "sft")
    assert [loss.weight for loss in objective.losses] == [0.8, 0.2]
    assert objective.needs_reference
    assert objective.ld_alpha == 0.5


ALPHA_DIVERGENCE = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (DPOConfig, {"f_divergence_type": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
        (DPOConfig, ALPHA_DIVERGENCE, ALPHA_DIVERGENCE),
        (DPOConfig, {"loss_type": "discopop", "discopop_tau": 0.1}, {"discopop_tau": 0.1}),
        (DPOConfig, {"loss_type": "bco_pair", "bco_shift": True}, {"bco_shift": True}),
        (CPOConfig, {"loss_type": "simpo", "simpo_gamma": 1.5, "cpo_alpha": 0.0}, {"gamma": 1.5, "nll_weight": 0.0}),
        (CPOConfig, {"alpha": 0.25}, {"alpha": 0.25, "nll_weight": 1.0}),
        (TPOConfig, {"loss_type": "tpo-l", "tpo_l_gamma": 0.7, "tpo_alpha": 0.2}, {"gamma": 0.7, "nll_weight": 0.2}),
        (TPOConfig, {"use_weighting": True, "beta": 0.3}, {"use_weighting": True, "beta": 0.3}),
    ],
)  # fmt: skip
def test_options_are_translated_to_the_cores_names(config, options, expected, monkeypatch):
    seen: dict[str, Any] = {}
    made = make(config, **options)
    monkeypatch.setattr("prefopt.objective.build_objective", lambda method, **given: seen.update(given, method=method))
    made.objective()
    assert {name: seen[name] for name in expected} == expected
    assert seen["method"] == config.METHOD


def test_objective_follows_a_changed_option():
    made = make(TPOConfig)
    made.tpo_alpha = 0.0  # as a hyper-parameter search does
    assert made.objective().branches == ("chosen", "rejected")


def test_alphapo_has_no_likelihood_term():
    objective = make(CPOConfig, loss_type="alphapo", alpha=0.25).objective()
    assert [loss.name for loss in objective.losses] == ["alphapo"]


# What the user set


@pytest.mark.parametrize("config", CONFIGS)
def test_was_set_tells_choices_from_defaults(config):
    made = config("out", beta=0.1, report_to="none")
    assert made.was_set("output_dir")
    assert made.was_set("beta")
    assert not made.was_set("gradient_checkpointing")
    made.max_length = 7
    assert made.was_set("max_length")
    with pytest.raises(AttributeError, match="no option 'bta'"):
        made.was_set("bta")


def test_both_names_of_checkpointing_are_one_option():
    made = make(DPOConfig, gradient_checkpointing=True)
    assert made.was_set("gradient_checkpointing")
    if hasattr(made, "activation_checkpointing"):
        assert made.was_set("activation_checkpointing")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_remember_what_was_set(duplicate):
    made = make(DPOConfig, beta=0.2, gradient_checkpointing=False)
    other = duplicate(made)
    assert other == made
    assert other.user_set == made.user_set
    assert other.was_set("beta")
    assert not other.was_set("bf16")


def test_replace_adds_what_it_changes_and_nothing_else():
    made = make(DPOConfig, beta=0.2)
    other = dataclasses.replace(made, learning_rate=1e-5)
    assert {*other.user_set} == {*made.user_set, "learning_rate"}


def test_a_config_comes_back_from_its_dict_and_its_json():
    made = make(DPOConfig, beta=0.2, gradient_checkpointing=False, model_init_kwargs={"dtype": "bfloat16"})
    for values in (made.to_dict(), json.loads(made.to_json_string())):
        other = DPOConfig(**values)
        assert other.to_dict() == made.to_dict()
        assert other.was_set("gradient_checkpointing")
        assert not other.was_set("learning_rate")


def test_to_dict_leaves_the_config_alone():
    import torch

    made = make(DPOConfig, model_init_kwargs={"dtype": torch.bfloat16, "nested": {"dtype": torch.float32}})
    assert made.to_dict()["model_init_kwargs"]["dtype"] == "bfloat16"
    assert made.model_init_kwargs == {"dtype": torch.bfloat16, "nested": {"dtype": torch.float32}}


def test_secrets_do_not_show():
    made = make(DPOConfig, hub_token="hf_secret")
    assert "hf_secret" not in repr(made) + str(made) + made.to_json_string()


def test_json_strings_become_dicts():
    made = make(TPOConfig, model_init_kwargs='{"revision": "main", "n": 4}', lr_scheduler_kwargs='{"num_cycles": 1}')
    assert made.model_init_kwargs == {"revision": "main", "n": 4}
    assert made.lr_scheduler_kwargs == {"num_cycles": 1}


# Activation checkpointing, precision, layout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": True, "gradient_checkpointing": True}, True),
    ],
)
def test_either_name_of_checkpointing_is_obeyed(options, expected):
    if "activation_checkpointing" not in DPOConfig.__dataclass_fields__:
        options = {"gradient_checkpointing": expected}
    made = make(DPOConfig, **options)
    assert made.gradient_checkpointing is expected
    assert getattr(made, "activation_checkpointing", expected) is expected


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_replace_takes_either_name_of_checkpointing(name):
    if name not in DPOConfig.__dataclass_fields__:
        pytest.skip("this transformers has only the older name")
    made = dataclasses.replace(make(DPOConfig, gradient_checkpointing=True), **{name: False})
    assert made.gradient_checkpointing is False
    assert getattr(made, "activation_checkpointing", False) is False


def test_contradicting_names_of_checkpointing_are_refused():
    if "activation_checkpointing" not in DPOConfig.__dataclass_fields__:
        pytest.skip("this transformers has only the older name")
    message = mistakes_of(DPOConfig, gradient_checkpointing=True, activation_checkpointing=False)
    assert "two names of one option" in message


@pytest.mark.parametrize(
    ("hardware", "options", "launched", "expected"),
    [
        (True, {}, "no", True),
        (False, {}, "no", False),
        (True, {"fp16": True}, "no", False),
        (True, {}, "fp16", False),
        (False, {}, "bf16", True),
        (True, {"bf16": False}, "no", False),
        (False, {"bf16": True}, "no", True),
    ],
)
def test_bf16_follows_hardware_and_wish(monkeypatch, hardware, options, launched, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(precision, "has_bf16_hardware", lambda use_cpu: hardware)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: hardware)
    assert make(DPOConfig, **options).bf16 is expected


def test_no_bf16_hardware_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(precision, "has_bf16_hardware", lambda use_cpu: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        make(DPOConfig)
        make(CPOConfig)
    assert [record.message for record in caplog.records if "float32" in record.message] == [
        "No bfloat16 hardware found: training in float32. Set bf16=True to use bfloat16 on the CPU."
    ]


def test_use_cpu_means_no_bf16_hardware():
    assert precision.has_bf16_hardware(use_cpu=True) is False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "auto"),
        ({"padding_free": True}, "packed"),
        ({"layout": "shared_prompt"}, "shared_prompt"),
        ({"padding_free": True, "layout": "packed"}, "packed"),
    ],
)
def test_padding_free_is_the_packed_layout(options, expected):
    assert make(CPOConfig, **options).batch_layout == expected


@pytest.mark.filterwarnings("ignore:.*padding_free=True has no effect")
def test_an_explicit_layout_wins_over_padding_free():
    assert make(TPOConfig, padding_free=True, layout="auto").batch_layout == "auto"


@pytest.mark.parametrize(("given", "expected"), [("auto", None), ("none", None), ("16", 16), (8, 8), (None, None)])
def test_pad_to_multiple_of_is_resolved(given, expected):
    assert make(DPOConfig, pad_to_multiple_of=given).pad_to_multiple_of == expected


def test_padding_on_neuron(monkeypatch):
    monkeypatch.setattr("prefopt.trainer.config_base._on_neuron", lambda: True)
    assert make(DPOConfig).pad_to_multiple_of == 128
    assert make(TPOConfig).pad_to_multiple_of is None
