"""What a config remembers of its user, and how precision, checkpointing and layout are resolved."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle

import pytest
from config_cases import CONFIGS, make, mistakes_of

from prefopt.trainer import precision
from prefopt.trainer.config import CPOConfig, DPOConfig, TPOConfig

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
