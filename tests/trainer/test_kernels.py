"""Kernels of other packages: Liger's in the layers, those of the Hub, flash attention."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from config_cases import CONFIGS, make, warnings_of
from datasets import Dataset
from scoring.attention_kernels import lower_right, stand_in
from short_runs import TRAINERS, dataset, relative_difference, trainer, weights
from tiny_models import save_tiny, tiny_model, word_tokenizer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from prefopt.scoring.attention import backends, varlen
from prefopt.scoring.attention.backends import VARIABLE
from prefopt.trainer import kernels

ROUNDING = 1e-4
"""Relative difference of weights after a few steps: a kernel sums in another order."""
BROKEN = Dataset.from_dict({"prompt": [None], "chosen": [" baba"], "rejected": [" dada"]})
"""Rows whose preparation is an error: what is refused before is refused without it."""


def made_of_broken_rows(model: Any, method: str = "dpo", **options: Any) -> Any:
    make_trainer, config = TRAINERS[method]
    args = config("out", report_to="none", **options)
    return make_trainer(model, args=args, train_dataset=BROKEN, processing_class=word_tokenizer())


# -- Liger -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has no wheel for this platform")
def test_liger_computes_the_same_run(tmp_path: Path) -> None:
    """The package itself, its kernels in Triton's interpreter."""
    script = str(Path(__file__).with_name("liger_cases.py"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, script, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["layout"] == "shared_prompt"
    assert result["difference"] < ROUNDING
    assert result["config"] == kernels.OWN_HEAD
    layers = {
        "model.norm": "LigerRMSNorm.forward",
        "model.layers.0.mlp": "LigerSwiGLUMLP.forward",
        "model.layers.0.input_layernorm": "LigerRMSNorm.forward",
        "model.layers.0.post_attention_layernorm": "LigerRMSNorm.forward",
    }
    for model in (result["policy"], result["reference"]):
        assert model.items() >= layers.items()
        assert not any("lce" in forward for forward in model.values())


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What Liger is asked to do, on a machine that seems to have it and a GPU; a fused loss replaces the forward."""
    asked: list[tuple[Any, dict[str, Any]]] = []

    def apply(model: Any, config: dict[str, Any] | None) -> None:
        asked.append((model, dict(config or {})))
        if (config or {}).get("fused_linear_cross_entropy", True):
            model.forward = MethodType(lambda self, **inputs: pytest.fail("the forward of a loss"), model)

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply)
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    monkeypatch.setattr(kernels, "runs_triton", lambda config: True)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)
    return asked


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_liger_leaves_the_head_alone(method: str, tmp_path: Path, fake_liger: list[Any]) -> None:
    run = trainer(tmp_path, method, max_steps=1, use_liger_kernel=True, liger_kernel_config={"rope": False})
    run.train()
    assert {model is run.model for model, _ in fake_liger} == {True}
    assert len(fake_liger) == 2  # when the trainer is made, and by transformers
    assert all(config == {"rope": False, **kernels.OWN_HEAD} for _, config in fake_liger)


def test_a_given_reference_gets_the_kernels_too(tmp_path: Path, fake_liger: list[Any]) -> None:
    reference = tiny_model(seed=2)
    config = TRAINERS["dpo"][1](str(tmp_path), use_liger_kernel=True, report_to="none")
    run = TRAINERS["dpo"][0](
        tiny_model(), reference, config, train_dataset=dataset(4), processing_class=word_tokenizer()
    )
    assert [model for model, _ in fake_liger] == [run.model, reference]


@pytest.mark.parametrize("config", CONFIGS)
def test_on_a_cpu_liger_is_off_and_it_is_said(config: Any) -> None:
    (text,) = warnings_of(config, use_liger_kernel=True)
    assert "use_liger_kernel=True has no effect on a CPU" in text


@pytest.mark.filterwarnings("ignore:.*use_liger_kernel=True has no effect")
def test_on_a_cpu_the_run_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, use_liger_kernel=True)
    run.train()
    assert not run.args.use_liger_kernel


def test_a_loss_of_ligers_has_no_effect(fake_liger: list[Any]) -> None:
    config = {"fused_linear_cross_entropy": True, "rope": True}
    (text,) = warnings_of(CONFIGS[0], use_liger_kernel=True, liger_kernel_config=config)
    assert "{'fused_linear_cross_entropy': True} has no effect" in text
    assert make(CONFIGS[0], use_liger_kernel=True).liger_kernel_config is None


@pytest.mark.usefixtures("fake_liger")
def test_liger_that_is_not_there_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="use_liger_kernel=True: the package liger-kernel is not installed"):
        made_of_broken_rows(tiny_model(), use_liger_kernel=True)


# -- kernels of the Hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_kernels": True}, "the package kernels is not installed"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "kernels of the Hub need the package kernels"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn 2 is not installed, or there is no GPU"),
        ({"attn_implementation": {"": "flash_attention_3"}}, "flash-attn 3 is not installed, or there is no GPU"),
    ],
    ids=["kernels", "attention", "flash", "parts"],
)
def test_a_package_that_is_not_there_is_said_first(options, message, method, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "is_kernels_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: False)
    with pytest.raises(ImportError, match=message):
        made_of_broken_rows("a/model", method, model_init_kwargs=options)


def test_layers_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``use_kernels`` reaches transformers, which replaces forwards of layers; the run is what it was."""

    def rms_norm(self: Any, hidden: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    def set_use_kernels(self: Any, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        for module in self.modules() if use_kernels else ():
            if "RMSNorm" in type(module).__name__:
                module.forward = MethodType(rms_norm, module)
                replaced.append(module)
        self._use_kernels = use_kernels

    replaced: list[Any] = []
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", set_use_kernels)
    monkeypatch.setattr(kernels, "is_kernels_available", lambda: True)
    model = save_tiny(tmp_path / "model")
    plain = trainer(tmp_path / "plain", model=model, max_steps=2)
    plain.train()
    assert not replaced
    run = trainer(tmp_path / "run", model=model, max_steps=2, model_init_kwargs={"use_kernels": True})
    assert replaced
    run.train()
    assert relative_difference(weights(run.model), weights(plain.model)) < ROUNDING
    assert run.layout == plain.layout


# -- attention ---------------------------------------------------------------------------------------------------------


def flash_function(name: str, align: str = "lower right") -> Callable[..., Any]:
    """An attention function as transformers calls those of flash attention, which find their kernel by its name."""

    def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs: Any) -> Any:
        assert module.config._attn_implementation == name
        assert attention_mask is None or attention_mask.ndim == 2
        rows, length, keys = len(query), query.shape[2], key.shape[2]
        lengths = [keys] * rows if attention_mask is None else attention_mask.sum(1).tolist()
        outputs = torch.zeros(rows, length, query.shape[1], value.shape[-1])
        for row, count in enumerate(lengths):
            first = 0 if keys == length or align == "lower right" else keys - length
            size = length if attention_mask is None else count
            bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (size, count - first)]
            q, k, v = query[row, :, :size], key[row, :, : count - first], value[row, :, : count - first]
            left = -1 if sliding_window is None else sliding_window - 1
            parts = (part.transpose(0, 1) for part in (q, k, v))
            outputs[row, :size] = lower_right(*parts, (*bounds, size, count), left=left, scale=scaling)
        return outputs, None

    return attention


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers an attention function, for one test, as transformers does with a kernel that it has loaded."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))

    def register(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)

    return register


def with_attention(name: str, family: str = "mistral") -> Any:
    model = tiny_model(family, seed=1, sliding_window=4)
    model.config._attn_implementation_internal = name
    return model


@pytest.mark.parametrize("layout", ["shared_prompt", "packed", "padded"])
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("kernels-community/flash-attn2", flash_attention_mask),
        ("someone/attention@v1:forward", flash_attention_mask),
        ("someone/sparse", sdpa_mask),
    ],
)
def test_attention_from_the_hub(name: str, mask: Any, layout: str, tmp_path: Path, own_registry: Any) -> None:
    """Whatever it is called, it gets the masks that transformers would make for it."""
    own_registry(name, flash_function(name) if mask is flash_attention_mask else sdpa_attention_forward, mask)
    plain = trainer(tmp_path / "plain", max_steps=2, model=with_attention("sdpa"), layout=layout)
    run = trainer(tmp_path / "run", max_steps=2, model=with_attention(name), layout=layout)
    assert run.layout == plain.layout
    assert run.layout.layout == layout
    plain.train()
    run.train()
    assert relative_difference(weights(run.model), weights(plain.model)) < ROUNDING
    assert run.model.config._attn_implementation == name


def test_attention_that_aligns_in_another_way_is_found_by_the_trial(tmp_path: Path, own_registry: Any) -> None:
    """Where there are more keys than queries it lets them see the wrong ones: it can pack, and not share."""
    name = "kernels-community/flash-attn-of-old"
    own_registry(name, flash_function(name, align="upper left"), flash_attention_mask)
    layout = trainer(tmp_path, model=with_attention(name)).layout
    assert layout.layout == "packed"
    assert "shared_prompt differs from the plain forward" in str(layout)


@pytest.mark.parametrize("kernel", ["flash", "varlen"])
def test_a_flash_kernel_computes_a_run(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the trial, the layers, checkpointing and the backward pass, with plain torch in its place."""
    plain = trainer(tmp_path / "plain", max_steps=2, model=with_attention("sdpa"))
    plain.train()
    attend, calls = stand_in(monkeypatch, kernel), []
    monkeypatch.setattr(varlen, "common_obstacle", lambda case: None)
    backend = backends.Backend(lambda *a: calls.append(1) or attend(*a), backends.BACKENDS[kernel].obstacle)
    monkeypatch.setitem(backends.BACKENDS, kernel, backend)
    monkeypatch.setenv(VARIABLE, kernel)
    backends.fault.cache_clear()
    run = trainer(tmp_path / "run", max_steps=2, model=with_attention("sdpa"), gradient_checkpointing=True)
    assert run.layout.layout == "shared_prompt"
    run.train()
    backends.fault.cache_clear()
    assert calls
    assert relative_difference(weights(run.model), weights(plain.model)) < ROUNDING
