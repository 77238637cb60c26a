"""The configs: TRL's options and defaults, every rule, and the objective they describe."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from config_cases import CONFIGS, make, mistakes_of, warnings_of

from prefopt.trainer.config import CPOConfig, DPOConfig, PreferenceConfig, TPOConfig

INTENDED = {
    # NaN in the log is information, and hiding it costs a synchronisation per micro-batch
    "logging_nan_inf_filter": False,
}
"""Defaults that differ from TRL's on purpose."""


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
    shared |= {"full_logits_for_metrics", "tokens_per_batch", "allow_changes", "image_roots"}
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
    (TPOConfig, "tokens_per_batch", 0),
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


def test_activation_offloading_is_for_accelerators(monkeypatch):
    (text,) = warnings_of(DPOConfig, activation_offloading=True, use_cpu=True)
    assert "activation_offloading=True has no effect on a CPU" in text
    monkeypatch.setattr("prefopt.trainer.config_base._on_accelerator", lambda config: True)
    assert not warnings_of(DPOConfig, activation_offloading=True)


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
        (TPOConfig, {"num_eval_samples": 2}, "num_eval_samples=2 has no effect"),
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


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_move_weights_within_the_backward_pass_are_refused(config: Any, optim: str) -> None:
    assert "before anyone can say whether the step is finite" in mistakes_of(config, optim=optim)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_static_graph_is_said_to_have_no_effect(config: Any) -> None:
    """What it would do to the gradients is held by the case "a static graph" of two ranks."""
    assert any("ddp_static_graph=True has no effect" in text for text in warnings_of(config, ddp_static_graph=True))
