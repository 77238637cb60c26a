"""The card says what is known, and user text stays text."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, concatenate_datasets
from huggingface_hub import ModelCard
from short_runs import dataset, trainer
from tiny_models import WORDS, standard_rows
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from prefopt.data import DatasetConfig, DatasetMixtureConfig, get_dataset, load_source
from prefopt.trainer.card_facts import DataSet, named_rows
from prefopt.trainer.citations import PAPERS, cited_papers
from prefopt.trainer.model_card import cell, code, model_card, write_model_card
from prefopt.trainer.saving.pushing import withheld

FULL: dict[str, Any] = {
    "method": "dpo",
    "losses": ["sigmoid", "bco_pair"],
    "model_name": "/home/someone/out/my-run",
    "base_model": "Qwen/Qwen3-0.6B",
    "datasets": [
        DataSet("trl-lib/ultrafeedback_binarized", "training", "61,131 of 61,135, 4 skipped"),
        DataSet("trl-lib/ultrafeedback_binarized", "evaluation", "1,000"),
        DataSet("data/mine.jsonl", "evaluation, mine"),
    ],
    "settings": {
        "beta": 0.1,
        "ld_alpha": 0.5,
        "hub_token": "hf_abcdef",
        "loss_weights": None,
        "tokens_per_batch": 4096,
    },
    "run": {"status": "finished", "steps": "200 of 200"},
    "curves": "curves.png",
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
    assert "| `trl-lib/ultrafeedback_binarized` | `training` | 61,131 of 61,135, 4 skipped |" in card
    assert "| `trl-lib/ultrafeedback_binarized` | `evaluation` | 1,000 |" in card
    assert "| `data/mine.jsonl` | `evaluation, mine` |  |" in card
    assert "| steps | `200 of 200` |" in card
    assert "](curves.png)" in card
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
    assert "| `x\\|y` | `training` | 3 |" in model_card(method="dpo", datasets=[DataSet("x|y", rows="3")])


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
        ("dpo", ["sigmoid", "bco_pair", "sft"], {}, ["dpo", "bco_pair", "mpo"]),
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
        layout=SimpleNamespace(layout="padded"),
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
    assert "`unnamed rows` | `training` | 2 |" in card
    for absent in ("None", "hf_x", "bf16", "runtime", str(tmp_path)):
        assert absent not in card


# -- of real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFOPT_REPORT", raising=False)


def parts(card: str) -> dict[str, str]:
    """Title of a section -> its text."""
    return {part.split("\n", 1)[0]: part for part in card.split("\n## ")[1:]}


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def saved_rows(folder: Path) -> Any:
    """Rows of a file, one of them an identical pair."""
    rows = Dataset.from_dict(standard_rows(8))
    folder.mkdir()
    same = rows.select([0]).map(lambda row: {"rejected": row["chosen"]})
    concatenate_datasets([rows, same]).to_json(folder / "mine.jsonl")
    return load_source(str(folder / "mine.jsonl"), split="train")


def test_the_card_of_a_run_that_has_ended(tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-secret-of-the-environment")
    run = trainer(
        tmp_path / "run",
        rows=saved_rows(tmp_path / "data"),
        eval_dataset=dataset(5),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        loss_type=["sigmoid", "sft"],
        hub_model_id="me/a-secret-of-the-environment",
        hub_token="hf_abcdefghijklmnop",
    )
    run.train()
    run.save_model()
    first, last = parts(read(tmp_path / "run" / "checkpoint-1")), parts(read(tmp_path / "run"))
    assert "| status | `in training` |" in first["Run"]
    assert "| steps | `1 of 2` |" in first["Run"]
    assert "Curves" not in first
    assert "| status | `finished` |" in last["Run"]
    assert "| steps | `2 of 2` |" in last["Run"]
    assert "| `mine.jsonl` | `training` | 8 of 9, 1 skipped |" in last["Data"]
    assert "| `unnamed rows` | `evaluation` | 5 |" in last["Data"]
    assert "| `loss_type` | `sigmoid, sft` |" in last["Settings"]
    for name, value in run.state.log_history[-1].items():
        if name == "train_loss":
            assert f"| `train_loss` | {value:.4g} |" in last["Results"]
    assert {"eval_loss", "loss", "grad_norm"} <= set(re.findall(r"`([\w/]+)`", last["Results"]))
    (picture,) = re.findall(r"!\[[^]]*\]\((.*)\)", last["Curves"])
    assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    assert not any(fnmatch(picture, pattern) for pattern in withheld(run.args))  # so that the Hub has it too
    assert "2305.18290" in last["Citation"]
    text = read(tmp_path / "run")
    assert not [word for word in WORDS if word and re.search(rf"\b{word}\b", text)]  # of the data
    for absent in ("None", "hf_abc", "a-secret", str(tmp_path), "nan"):
        assert absent not in text


@pytest.mark.parametrize(("error", "said"), [(RuntimeError("dada sisi"), "RuntimeError"), (KeyboardInterrupt(), "")])
def test_the_card_of_a_run_that_did_not_end_well(error: BaseException, said: str, tmp_path: Path, drawn: None) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise error

    run = trainer(tmp_path / "run", max_steps=4, callbacks=[Stop()])
    with pytest.raises(type(error)):
        run.train()
    run.save_model()
    card = parts(read(tmp_path / "run"))
    wanted = f"failed before its end ({said})" if said else "stopped before its end (KeyboardInterrupt)"
    assert f"| status | `{wanted}` |" in card["Run"]
    assert "| steps | `2 of 4` |" in card["Run"]
    assert "Curves" in card
    assert "sisi" not in read(tmp_path / "run")


def test_curves_of_another_run_are_not_shown(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "curves.png").write_bytes(b"old")
    os.utime(tmp_path / "run" / "curves.png", (1e9, 1e9))
    run.save_model()
    assert {"Run", "Curves"} & set(parts(read(tmp_path / "run"))) == set()
    run.train()
    run.save_model()
    assert "Curves" not in parts(read(tmp_path / "run"))


def test_an_adapter_and_what_the_user_says(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    run = trainer(tmp_path / "run", peft_config=adapter)
    run.create_model_card("mine", dataset_name="me/pairs", tags="safety", license="mit", language="en", tasks="chat")
    card = read(tmp_path / "run")
    assert front_matter(card) | {"tags": None} == {
        "datasets": ["me/pairs"],
        "language": "en",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": None,
    }
    assert "safety" in front_matter(card)["tags"]
    assert "# `mine`" in card
    settings = parts(card)["Settings"]
    for name, value in {"adapter": "LORA", "r": 2, "lora_alpha": 6, "target_modules": "q_proj, v_proj"}.items():
        assert f"| `{name}` | `{value}` |" in settings


def rows_named(name: str | None, builder: str | None = "json", file: str | None = None) -> Any:
    info = SimpleNamespace(dataset_name=name, builder_name=builder)
    return SimpleNamespace(info=info, cache_files=[{"filename": file}] if file else [])


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (rows_named("json"), "unnamed rows"),
        (rows_named(None, None), "unnamed rows"),
        (rows_named("/home/someone/pairs/a.jsonl"), "a.jsonl"),
        (rows_named("me/a, /home/someone/b.jsonl"), "me/a, b.jsonl"),
        (rows_named("pairs", "parquet", "/cache/me___pairs/default/0.0.0/1/pairs-train.arrow"), "me/pairs"),
        (rows_named("me/pairs", "parquet", "/cache/me___pairs/default/0.0.0/1/pairs-train.arrow"), "me/pairs"),
    ],
)
def test_names_of_data_sets(rows: Any, name: str) -> None:
    assert named_rows(rows) == (name, None)


def test_a_mixture_has_the_names_of_its_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Dataset.from_dict(standard_rows(3)).to_json(tmp_path / f"{name}.jsonl")
    config = DatasetMixtureConfig([DatasetConfig(str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")])
    config.test_split_size = 2
    for split, count in (("train", 4), ("test", 2)):
        assert named_rows(get_dataset(config)[split]) == ("a.jsonl, b.jsonl", count)
