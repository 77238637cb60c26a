"""``prefopt compare``: its numbers are those of the definition, for both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import save_tiny, standard_rows, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli.main import main
from prefopt.inspection.comparing.comparison import Settings, compared
from prefopt.inspection.comparing.kl import kl_of_logits
from prefopt.inspection.comparing.statistics import PairScores, lines, worst_and_best

NATS = 2e-4
"""A sum of some 20 float32 log-probs by two layouts."""
SETTINGS = Settings(num_samples=2, max_new_tokens=5, num_kl_rows=3, batch_size=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders: base, another model, an adapter on the base."""
    from families import randomise

    folder = tmp_path_factory.mktemp("models")
    base = save_tiny(folder / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    randomise(adapted)
    adapted.save_pretrained(folder / "adapter")
    word_tokenizer().save_pretrained(folder / "adapter")
    return {"base": base, "other": save_tiny(folder / "other", seed=5), "adapter": str(folder / "adapter")}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_dict(standard_rows(7, seed=3))


def loaded(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name).eval()


@torch.no_grad()
def logps_and_rows(model: Any, tokenizer: Any, prompt: str, completion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a completion's tokens, one by one, and the [n, V] logits that predict them."""
    start = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    logits = model(torch.tensor([whole])).logits[0, len(start) - 1 : -1].double()
    return logits.log_softmax(-1)[range(len(whole) - len(start)), whole[len(start) :]], logits


@pytest.mark.parametrize("tuned", ["other", "adapter"])
def test_log_probs_and_divergences_are_those_of_the_definition(models: Any, rows: Dataset, tuned: str) -> None:
    found = compared(models["base"], models[tuned], rows, SETTINGS, lambda scores: [0])
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    both = {"base": loaded(models["base"]), "tuned": loaded(models[tuned])}
    for branch in ("chosen", "rejected"):
        divergences = []
        for place, row in enumerate(rows):
            parts = {name: logps_and_rows(model, tokenizer, row["prompt"], row[branch]) for name, model in both.items()}
            for name, (logps, _) in parts.items():
                ours = getattr(found.scores, f"{name}_{branch}")[place]
                assert ours == pytest.approx(float(logps.sum()), abs=NATS)
            (logps, policy), (_, reference) = parts["tuned"], parts["base"]
            assert getattr(found.scores, f"tokens_{branch}")[place] == len(logps)
            p, q = policy.softmax(-1), reference.softmax(-1)
            divergences.append(float((p * (p / q).log()).sum(-1).mean()))
        kl = next(kl for kl in found.kl if kl.texts == branch)
        assert kl.figure.value == pytest.approx(np.mean(divergences[:3]), rel=1e-3)
        assert kl.figure.value > 0.01
    assert [text.strip() for text in found.texts[0]] == [
        rows[0][name].strip() for name in ("prompt", "chosen", "rejected")
    ]


def test_the_samples_are_the_greedy_text_of_each_model(models: Any, rows: Dataset) -> None:
    found = compared(models["base"], models["other"], rows, SETTINGS, lambda scores: [])
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    for place, sample in enumerate(found.samples):
        ids = tokenizer(rows[place]["prompt"], return_tensors="pt")["input_ids"]
        for name in ("base", "other"):
            said = loaded(models[name]).generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=2)[
                0, ids.shape[1] :
            ]
            text = tokenizer.decode(said, skip_special_tokens=True)
            assert text == (sample.base if name == "base" else sample.tuned)


def test_a_model_beside_itself_shows_no_change(models: Any, rows: Dataset) -> None:
    found = compared(models["base"], models["base"], rows, SETTINGS, lambda scores: [])
    assert all(abs(line.change.value) < NATS for line in found.lines if line.change)
    assert all(abs(kl.figure.value) < 1e-6 for kl in found.kl)
    assert all(sample.base == sample.tuned for sample in found.samples)


def test_statistics_of_pairs_made_by_hand() -> None:
    scores = PairScores(
        rows=np.array([0, 2, 5]),
        base_chosen=np.array([-4.0, -9.0, -2.0]),
        base_rejected=np.array([-3.0, -9.0, -4.0]),
        tuned_chosen=np.array([-2.0, -8.0, -3.0]),
        tuned_rejected=np.array([-4.0, -10.0, -4.0]),
        tokens_chosen=np.array([4, 3, 2]),
        tokens_rejected=np.array([2, 3, 8]),
    )
    found = {line.name: line for line in lines(scores)}
    accuracy = found["accuracy"]
    assert (accuracy.base.value, accuracy.tuned.value) == pytest.approx((1 / 3, 1.0))
    assert accuracy.change.error == pytest.approx(1 / 3)  # changes 1, 1, 0: deviation sqrt(1/3) over sqrt(3)
    # per token: base -1, -3, -1 beside -1.5, -3, -0.5: right, tie, wrong; tuned -0.5, -8/3, -1.5; -2, -10/3, -0.5
    assert found["accuracy per token"].base.value == pytest.approx(1 / 3)
    assert found["accuracy per token"].tuned.value == pytest.approx(2 / 3)
    assert found["margin"].base.value == pytest.approx(1 / 3)
    # the longer one: chosen is preferred and longer, equal lengths, rejected is longer and preferred
    assert found["longer one preferred"].base.value == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores.shift.tolist() == [3.0, 2.0, -1.0]
    assert found["moved the right way"].tuned.value == pytest.approx(2 / 3)
    assert worst_and_best(scores, 5) == ([2], [0])


def test_the_divergence_of_two_distributions_is_computed_over_the_whole_vocabulary() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert kl_of_logits(p.log() + 3, q.log() - 1).item() == pytest.approx(expected)


def test_the_command_writes_page_and_numbers(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = standard_rows(4)
    hostile["prompt"][0] += "<script>alert(1)</script>\x1b[31m"
    Dataset.from_dict(hostile).to_json(tmp_path / "pairs.jsonl")
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    options = ["--num_samples", "2", "--max_new_tokens", "4", "--max_rows", "3"]
    arguments = [models["base"], models["other"], "--dataset_name", str(tmp_path / "pairs.jsonl"), *options]
    assert main(["compare", *arguments, "--html", str(page), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy per token" in printed
    assert "3 pairs" in printed
    assert "\x1b[31m" not in printed
    assert "<script>" not in page.read_text()
    found = json.loads(numbers.read_text())
    assert found["num_rows"] == 3
    assert len(found["pairs"]["base_chosen"]) == 3


def test_models_of_other_vocabularies_are_refused(models: Any, rows: Dataset, tmp_path: Path, capsys: Any) -> None:
    other = save_tiny(tmp_path / "other")
    path = Path(other, "tokenizer.json")
    path.write_text(path.read_text().replace('"baba"', '"xx"').replace('"bebe"', '"baba"').replace('"xx"', '"bebe"'))
    rows.to_json(tmp_path / "pairs.jsonl")
    assert main(["compare", models["base"], other, "--dataset_name", str(tmp_path / "pairs.jsonl")]) == 2
    assert "have different vocabularies" in capsys.readouterr().err
