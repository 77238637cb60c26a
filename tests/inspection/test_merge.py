"""``prefopt merge``: what it writes computes the same, and what does not is never written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoders import tiny_encoder_decoder
from families import randomise
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import save_tiny, word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefopt.cli.main import main
from prefopt.inspection import merging
from prefopt.inspection.merging import NotTheSameError, merge

TOLERANCE = 1e-5
"""Of the largest logit: two ways to the same number in float32, some 1e-7 apart in each layer."""
ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: LoraConfig(target_modules=["q_proj"], use_rslora=True, r=3),
    "dora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    "head": lambda: LoraConfig(target_modules=["lm_head", "q_proj"]),
    "embeddings": lambda: LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "whole head": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": lambda: LoKrConfig(target_modules=["q_proj"], r=4),
    "oft": lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=8),
}


def adapted(folder: Path, base: str, config: Any, kind: Any = AutoModelForCausalLM) -> str:
    """A folder with an adapter that changes ``base``."""
    model = get_peft_model(kind.from_pretrained(base), config)
    randomise(model)
    model.save_pretrained(folder / "run")
    word_tokenizer().save_pretrained(folder / "run")
    return str(folder / "run")


def difference(base: str, run: str, merged: Path, kind: Any = AutoModelForCausalLM) -> float:
    """Of the logits of both on fresh tokens, as a share of the largest."""
    ids = torch.randint(9, 60, (3, 21))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind is AutoModelForSeq2SeqLM else {})
    with torch.no_grad():
        ours = kind.from_pretrained(merged).eval()(**inputs).logits
        expected = PeftModel.from_pretrained(kind.from_pretrained(base), run).eval()(**inputs).logits
        plain = kind.from_pretrained(base).eval()(**inputs).logits
    assert (expected - plain).abs().max() > 100 * TOLERANCE * expected.abs().max()  # the adapter does something
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_computes_what_base_and_adapter_compute(kind: str, tied: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    run = adapted(tmp_path, base, ADAPTERS[kind]())
    found = merge(run, tmp_path / "merged")
    assert found.same_texts == found.num_texts == 4
    assert found.logit_difference <= TOLERANCE
    assert difference(base, run, tmp_path / "merged") <= TOLERANCE


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_merged(kind: str, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    tiny_encoder_decoder(kind, tie_word_embeddings=True).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    modules = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    run = adapted(tmp_path, base, LoraConfig(target_modules=modules), AutoModelForSeq2SeqLM)
    merge(run, tmp_path / "merged")
    assert difference(base, run, tmp_path / "merged", AutoModelForSeq2SeqLM) <= TOLERANCE


@pytest.fixture
def run(tmp_path: Path) -> str:
    return adapted(tmp_path, save_tiny(tmp_path / "base"), ADAPTERS["lora"]())


def test_a_merge_that_is_wrong_is_not_written(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole = merging.merged_model

    def wrong(model: Any) -> Any:
        merged = whole(model)
        merged.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 0.01
        return merged

    monkeypatch.setattr(merging, "merged_model", wrong)
    assert main(["merge", run, "--output_dir", str(tmp_path / "merged")]) == 1
    printed, said = capsys.readouterr()
    assert "is not the same: logits differ by up to" in printed
    assert "Loading weights" not in said
    assert not (tmp_path / "merged").exists()


def test_a_model_that_reads_back_otherwise_is_not_put_in_place(run: str, tmp_path: Path, monkeypatch: Any) -> None:
    whole = merging.load_model

    def damaged(name: str, args: Any) -> Any:
        model = whole(name, args)
        if name.endswith(".writing"):
            model.lm_head.weight.data[3] += 0.1
        return model

    monkeypatch.setattr(merging, "load_model", damaged)
    with pytest.raises(NotTheSameError, match="Nothing was written"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(NotTheSameError):
        merge(run, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == [], "a folder that was there stays"


def test_rounded_weights_are_decided_by_the_texts(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = merge(run, tmp_path / "rounded", dtype="bfloat16", accept_rounding=True)
    assert TOLERANCE < found.logit_difference < 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto").dtype == torch.bfloat16
    whole = merging.generated
    monkeypatch.setattr(  # what is loaded from the staged folder says something else
        merging,
        "generated",
        lambda model, *rest: [[1]] * 4 if model.name_or_path.endswith(".writing") else whole(model, *rest),
    )
    with pytest.raises(NotTheSameError, match=r"does not say the same: .* 0 of 4"):
        merge(run, tmp_path / "other", dtype="bfloat16")
    assert merge(run, tmp_path / "accepted", dtype="bfloat16", accept_rounding=True).same_texts == 0


def test_weights_that_overflow_are_refused_whatever_is_accepted(run: str, tmp_path: Path, capsys) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.lm_head.weight.data[5, 0] = 1e6  # float16 ends at 65,504
    base.save_pretrained(tmp_path / "base")
    options = ["--dtype", "float16", "--accept_rounding"]
    assert main(["merge", run, "--output_dir", str(tmp_path / "merged"), *options]) == 1
    assert "logits are not finite" in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()


def test_virtual_tokens_cannot_be_merged(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="type PROMPT_TUNING is no change of the base's weights"):
        merge(adapted(tmp_path, base, config), tmp_path / "merged")


def test_the_newest_checkpoint_of_a_run_is_taken(run: str, tmp_path: Path) -> None:
    other = tmp_path / "outer"
    other.mkdir()
    Path(run).rename(other / "checkpoint-17")
    shutil.copytree(other / "checkpoint-17", other / "checkpoint-9")  # fewer steps, and copied last
    os.utime(other / "checkpoint-17", (0, 0))
    assert merge(other, tmp_path / "merged").adapter == other / "checkpoint-17"


@pytest.mark.parametrize(
    ("given", "message"),
    [("base", "is a whole model"), ("nowhere", "there is no such folder"), ("empty", "holds no adapter")],
)
def test_folders_without_an_adapter_are_refused(run: str, given: str, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["merge", str(tmp_path / given), "--output_dir", str(tmp_path / "merged")]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_written_over(run: str, tmp_path: Path, capsys) -> None:
    assert main(["merge", run, "--output_dir", str(tmp_path / "base")]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_a_file_is_no_output_dir(run: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["merge", run, "--output_dir", str(tmp_path / "file")]) == 2
    assert "is a file, not a folder; name another one" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
