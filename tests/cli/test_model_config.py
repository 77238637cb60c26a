"""Adapter, quantisation and device map from command-line options."""

from __future__ import annotations

import builtins

import pytest
import torch

from prefopt.cli.model_config import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config


def test_no_adapter_unless_asked_for():
    assert get_peft_config(ModelConfig()) is None


def test_adapter_options_reach_peft():
    pytest.importorskip("peft")
    config = get_peft_config(
        ModelConfig(
            use_peft=True,
            lora_r=8,
            lora_alpha=4,
            lora_dropout=0.1,
            lora_target_modules=["q_proj", "v_proj"],
            lora_modules_to_save=["lm_head"],
            use_rslora=True,
            use_dora=True,
        )
    )
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 4, 0.1, "none")
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["lm_head"])
    assert (config.use_rslora, config.use_dora, config.task_type) == (True, True, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("given", "held", "expected"),
    [
        (["all-linear"], "all-linear", "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj", r".*\.q_proj"),
        (["q_proj"], "q_proj", {"q_proj"}),
    ],
)
def test_one_target_module_is_a_pattern_or_a_name(given, held, expected):
    pytest.importorskip("peft")
    made = ModelConfig(use_peft=True, lora_target_modules=given)
    assert made.lora_target_modules == held
    config = get_peft_config(made)
    assert config is not None
    assert config.target_modules == expected


def test_missing_peft_is_named(monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ValueError, match=r"pip install 'prefopt\[peft\]'"):
        get_peft_config(ModelConfig(use_peft=True))


def test_quantisation_options():
    assert get_quantization_config(ModelConfig()) is None
    eight = get_quantization_config(ModelConfig(load_in_8bit=True))
    assert eight is not None
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    four = get_quantization_config(
        ModelConfig(load_in_4bit=True, dtype="bfloat16", bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    )
    assert four is not None
    assert four.load_in_4bit
    assert (four.bnb_4bit_compute_dtype, four.bnb_4bit_quant_type) == (torch.bfloat16, "fp4")
    assert four.bnb_4bit_use_double_quant


def test_two_precisions_are_refused():
    with pytest.raises(ValueError, match="load_in_8bit=True and load_in_4bit=True"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_device_map_of_a_quantised_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert get_kbit_device_map() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda: type("State", (), {"local_process_index": 3}))
    assert get_kbit_device_map() == {"": 3}
