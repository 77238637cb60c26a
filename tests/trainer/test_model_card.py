"""The card says what is known, and user text stays text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.trainer.citations import PAPERS, cited_papers
from prefopt.trainer.model_card import cell, code, model_card, write_model_card

FULL: dict[str, Any] = {
    "method": "dpo",
    "losses": ["sigmoid", "bco_pair"],
    "model_name": "/home/someone/out/my-run",
    "base_model": "Qwen/Qwen3-0.6B",
    "datasets": {"trl-lib/ultrafeedback_binarized": 61135, "data/mine.jsonl": None},
    "settings": {
        "beta": 0.1,
        "ld_alpha": 0.5,
        "hub_token": "hf_abcdef",
        "loss_weights": None,
        "tokens_per_batch": 4096,
    },
    "metrics": {"eval_rewards/accuracies": 0.8123456, "loss": float("nan"), "note": None, "step": 200},
    "license": "apache-2.0",
    "tags": ["custom", "dpo"],
}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_front_matter() -> None:
    assert front_matter(model_card(**FULL)) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["trl-lib/ultrafeedback_binarized"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["prefopt", "dpo", "custom"],
    }


def test_the_hub_reads_it() -> None:
    assert ModelCard(model_card(**FULL)).data.to_dict()["base_model"] == "Qwen/Qwen3-0.6B"


def test_content() -> None:
    card = model_card(**FULL)
    assert "# `my-run`" in card
    assert "from `Qwen/Qwen3-0.6B` on preference data with Direct Preference Optimization (DPO)" in card
    assert "| `trl-lib/ultrafeedback_binarized` | 61,135 |" in card
    assert "| `beta` | `0.1` |" in card
    assert "| `tokens_per_batch` | `4096` |" in card
    assert "| `eval_rewards/accuracies` | 0.8123 |" in card
    assert "| prefopt | " in card
    assert "2305.18290" in card
    assert "2404.04656" in card


@pytest.mark.parametrize("absent", ["None", "nan", "hf_abcdef", "hub_token", "/home", "someone", "loss_weights"])
def test_what_is_unknown_or_private_is_not_there(absent: str) -> None:
    assert absent not in model_card(**FULL)


def test_a_bare_card_has_no_empty_sections() -> None:
    card = model_card(method="tpo")
    assert "None" not in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Versions", "## Citation"]
    assert front_matter(card)["tags"] == ["prefopt", "tpo"]
    assert "license" not in front_matter(card)


def test_a_local_base_model_is_named_but_not_linked(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    card = model_card(method="cpo", base_model=str(folder), is_adapter=True)
    assert "base_model" not in front_matter(card)
    assert front_matter(card)["library_name"] == "peft"
    assert "This adapter was trained from `base`" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", "`plain`"),
        ("a`b", "`` a`b ``"),
        ("``", "``` `` ```"),
        ("<script>\n# x", "`<script> # x`"),
        ("[a](javascript:b)", "`[a](javascript:b)`"),
    ],
)
def test_user_text_stands_in_a_code_span(text: str, wanted: str) -> None:
    assert code(text) == wanted


def test_a_bar_does_not_end_a_cell() -> None:
    assert cell(code("a|b")) == "`a\\|b`"
    assert "| `x\\|y` | 3 |" in model_card(method="dpo", datasets={"x|y": 3})


def test_yaml_in_a_name_stays_a_name() -> None:
    card = model_card(method="dpo", tags=["a: b", "- c\nlicense: mit"])
    assert front_matter(card)["tags"] == ["prefopt", "dpo", "a: b", "- c\nlicense: mit"]
    assert "license" not in front_matter(card)


@pytest.mark.parametrize(
    ("method", "losses", "settings", "wanted"),
    [
        ("dpo", ["sigmoid"], {}, ["dpo"]),
        ("dpo", ["apo_zero", "apo_down", "sft"], {}, ["dpo", "apo"]),
        ("dpo", ["sigmoid"], {"ld_alpha": 0.0, "use_weighting": True, "sync_ref_model": True}, "dpo ld_dpo wpo tr_dpo"),
        ("dpo", ["sigmoid"], {"f_divergence_type": "js_divergence"}, ["dpo", "f_divergence"]),
        ("cpo", ["simpo"], {"cpo_alpha": 0.0}, ["simpo"]),
        ("cpo", ["simpo"], {"cpo_alpha": 1.0}, ["cpo", "simpo"]),
        ("cpo", ["simpo"], {"cpo_alpha": 0.0, "alpha": 0.25}, ["simpo", "alphapo"]),
        ("tpo", ["tpo-l"], {}, ["tpo"]),
    ],
)
def test_citations(method: str, losses: list[str], settings: dict[str, Any], wanted: Any) -> None:
    names = wanted.split() if isinstance(wanted, str) else wanted
    assert cited_papers(method, losses, settings) == [PAPERS[name] for name in names]


def test_bibtex_is_well_formed() -> None:
    for paper in PAPERS.values():
        entry = paper.bibtex()
        assert entry.count("{") == entry.count("}")
        assert entry.startswith(f"@misc{{{paper.key},")
        assert 2023 <= paper.year <= 2025
        assert f"20{paper.arxiv[:2]}" == str(paper.year), paper.key
    assert len({paper.key for paper in PAPERS.values()}) == len(PAPERS)


def test_of_a_trainer(tmp_path: Path) -> None:
    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = SimpleNamespace(
        method="dpo",
        preference=SimpleNamespace(names=("sigmoid",)),
        args=SimpleNamespace(
            output_dir=str(tmp_path / "run"), hub_model_id=None, beta=0.2, bf16=False, hub_token="hf_x"
        ),
        model=LlamaForCausalLM(LlamaConfig(**size)),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        state=SimpleNamespace(log_history=[{"loss": 0.7}, {"loss": 0.5, "train_runtime": 3.0}]),
    )
    path = write_model_card(trainer, tmp_path / "run" / "checkpoint-3")
    card = path.read_text(encoding="utf-8")
    assert path.name == "README.md"
    assert [file.name for file in path.parent.iterdir()] == ["README.md"]
    assert "# `run`" in card
    assert "| `loss` | 0.5 |" in card
    assert "| `beta` | `0.2` |" in card
    assert "`training data` | 2 |" in card
    for absent in ("None", "hf_x", "bf16", "runtime", str(tmp_path)):
        assert absent not in card
