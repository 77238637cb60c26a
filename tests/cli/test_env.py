"""``prefopt env``: what it says is what a run gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoders import tiny_encoder_decoder
from tiny_models import save_tiny, tiny_model, word_tokenizer
from transformers import AutoConfig

from prefopt.cli.env import OPTIONAL, describe, rows_attention
from prefopt.cli.env import main as env
from prefopt.cli.env_model import attention_of, empty_model
from prefopt.cli.errors import UserError
from prefopt.cli.main import main
from prefopt.quickstart import ASSETS


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    return dict(describe(str(ASSETS)))


def test_versions_and_devices_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert env([]) == 0
    printed = capsys.readouterr().out
    assert f"torch                 {torch.__version__.partition('+')[0]}" in printed
    for name in ("prefopt", "transformers", "accelerate", "peft", "bf16", "attention", "layouts", "distributed"):
        assert f"\n{name} " in printed
    assert "\nmodel " not in printed


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, "very-secret-value")
    env([])
    assert "very-secret-value" not in capsys.readouterr().out


def test_a_package_that_is_not_there_says_what_it_would_switch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.cli.env.version_of", lambda package: None)
    found = dict(describe())
    assert found["torch"] == "not installed"
    for package, purpose in OPTIONAL.items():
        assert found[package] == f"not installed ({purpose})"
    assert "pip install 'prefopt[peft]'" in found["peft"]


def test_the_precision_is_the_one_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dict(describe())["bf16"].startswith("off by default")
    monkeypatch.setattr("prefopt.trainer.precision.has_bf16_hardware", lambda use_cpu=False: True)
    assert dict(describe())["bf16"] == "on by default"


def test_attention_of_rows_is_what_the_run_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU segment by segment, with the reasons of the kernels; else the backend that `backend_for` names."""
    from prefopt.scoring.attention import backends

    cpu = torch.device("cpu")
    said = rows_attention(cpu, ["plain", "soft cap"])
    assert said.startswith("segment by segment")
    assert "varlen" in said
    assert "flex: it has no backward pass outside CUDA devices" in said
    flex = backends.BACKENDS["flex"]
    monkeypatch.setattr(backends, "backend_for", lambda name, case: flex if case.softcap else None)
    assert "plain: segment by segment" in rows_attention(cpu, ["plain", "soft cap"])
    assert rows_attention(cpu, ["soft cap"]) == "flex"


def test_the_head_kernel_is_the_one_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.cli.env import head_kernel
    from prefopt.scoring.head import rows, torch_rows

    assert head_kernel("cpu") == "torch, tile by tile (cpu)"
    triton = type("Kernel", (), {"__module__": "prefopt.scoring.head.triton_rows"})()
    made = rows.RowFunctions(triton, torch_rows.logit_gradients_, torch_rows.stats_and_gradients_)
    monkeypatch.setattr(rows, "row_functions", lambda device_type: made)
    assert head_kernel("cuda") == "Triton, tile by tile"


def test_the_fused_optimizer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dict(describe())["optimizer"].endswith("fused AdamW runs on cpu")

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no fused kernel")

    monkeypatch.setattr(torch.optim, "AdamW", fails)
    assert "does not run on cpu (no fused kernel): set optim to adamw_torch" in dict(describe())["optimizer"]


# -- a model -------------------------------------------------------------------------------------------------------


def test_size_context_and_head_are_the_models(tmp_path: Path) -> None:
    for tied in (True, False):
        path = save_tiny(tmp_path / str(tied), "llama", tie_word_embeddings=tied)
        found = dict(describe(path))
        count = sum(weight.numel() for weight in tiny_model("llama", tie_word_embeddings=tied).parameters())
        assert found["model size"].startswith(f"{count / 1e6:,.2f} M parameters; ")
        assert found["model context"] == f"{AutoConfig.from_pretrained(path).max_position_embeddings} tokens"
        assert found["model head"].startswith("tied" if tied else "a matrix of its own")


def test_a_model_gets_the_layouts_of_its_config(tmp_path: Path) -> None:
    for family, expected in (("llama", "shared_prompt, packed, padded (layout=auto takes"), ("lfm2", "padded (Lfm2")):
        path = save_tiny(tmp_path / family, family)
        assert dict(describe(path))["model layouts"].startswith(expected)


def test_an_encoder_decoder_has_its_own(tmp_path: Path) -> None:
    tiny_encoder_decoder("t5").save_pretrained(tmp_path)
    found = dict(describe(str(tmp_path)))
    assert found["model layouts"].startswith("encoder_decoder")
    assert "T5" in found["model"]


@pytest.mark.parametrize(("family", "kinds"), [("llama", ["plain"]), ("gemma2", ["plain", "window", "soft cap"])])
def test_the_kinds_of_attention_are_the_models(
    family: str, kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def asks(device: Any, given: Any, **sizes: Any) -> str:
        asked.append((list(given), sizes))
        return ""

    model = empty_model(save_tiny(tmp_path, family))
    monkeypatch.setattr("prefopt.cli.env_model.rows_attention", asks)
    attention_of(model)
    layer = model.model.layers[0].self_attn
    ((given, sizes),) = asked
    assert given == kinds
    assert sizes["head_dim"] == layer.head_dim
    assert sizes["heads"] * layer.head_dim == layer.q_proj.out_features
    assert sizes["kv_heads"] * layer.head_dim == layer.k_proj.out_features


def test_the_chat_template_is_looked_for(tmp_path: Path, lines: dict[str, str]) -> None:
    path = save_tiny(tmp_path, "llama")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(path)
    assert dict(describe(path))["model chat template"] == "there is one"
    assert lines["model chat template"].startswith("none")


def test_a_model_that_is_not_there_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model can be made of this name"):
        dict(describe(str(tmp_path / "nowhere")))
    assert main(["env", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" not in capsys.readouterr().err
