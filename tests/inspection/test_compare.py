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

from prefopt.cli.compare import figures
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


def test_the_command_writes_page_and_numbers(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # of no terminal: nothing is cut
    hostile = standard_rows(4)
    hostile["prompt"][1] += " baba" * 60
    hostile["prompt"][0] += "<script>alert(1)</script>\x1b[31m"
    Dataset.from_dict(hostile).to_json(tmp_path / "pairs.jsonl")
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    options = ["--num_samples", "2", "--max_new_tokens", "4", "--max_rows", "3"]
    arguments = [models["base"], models["other"], "--dataset_name", str(tmp_path / "pairs.jsonl"), *options]
    assert main(["compare", *arguments, "--html", str(page), "--json", str(numbers)]) == 0
    printed, said = capsys.readouterr()
    assert "accuracy per token" in printed
    assert "Loading weights" not in said
    assert "Generating" not in said
    assert "3 pairs" in printed
    assert len(next(line for line in printed.splitlines() if "accuracy per token" in line)) > 40
    assert f"  prompt   {hostile['prompt'][1]}" in printed.splitlines()
    assert printed.endswith(f"written: {page}\nwritten: {numbers}\n")
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


def spoilt(folder: Path, source: str, token: int) -> str:
    """The model with a token whose embedding is no number."""
    model = loaded(source)
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_whose_log_probs_are_not_finite_is_one_message(models: Any, tmp_path: Path, capsys: Any) -> None:
    rows = Dataset.from_dict(standard_rows(5, seed=3))
    word = AutoTokenizer.from_pretrained(models["base"])(rows[2]["chosen"])["input_ids"][0]
    rows.to_json(tmp_path / "pairs.jsonl")
    tuned = spoilt(tmp_path / "spoilt", models["base"], word)
    assert main(["compare", models["base"], tuned, "--dataset_name", str(tmp_path / "pairs.jsonl")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("prefopt: "))
    assert f"{tuned}: its log-probs of " in line
    assert "of 5 pairs are not finite (row" in line
    assert " 2" in line


def test_texts_that_the_context_ends_are_cut_too(tmp_path: Path, rows: Dataset) -> None:
    """Models that never say the end token: one with room for all new tokens, one whose context ends before."""
    found = {}
    for name, context in (("long", 256), ("short", 24)):
        model = loaded(save_tiny(tmp_path / name, max_position_embeddings=context))
        model.lm_head.weight.data[word_tokenizer().eos_token_id] = 0  # its logit is 0, the largest is above
        model.save_pretrained(tmp_path / name)
        settings = Settings(num_samples=2, max_new_tokens=40, num_kl_rows=1, batch_size=1, max_length=22)
        found[name] = compared(*[str(tmp_path / name)] * 2, rows, settings, lambda scores: [])
    assert all(sample.num_tokens == (40, 40) for sample in found["long"].samples)
    assert all(max(sample.num_tokens) < 40 for sample in found["short"].samples)
    assert all(sample.was_cut == (True, True) for each in found.values() for sample in each.samples)
    assert {name: line for name, *line in figures(found["short"])}["own text cut"][:2] == ["2", "2"]


def test_a_text_that_ends_is_not_cut_even_at_the_last_token(tmp_path: Path, models: Any, rows: Dataset) -> None:
    model, tokenizer = loaded(models["base"]), AutoTokenizer.from_pretrained(models["base"])
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    said = model.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=2)[0, ids.shape[1] :]
    place = next(place for place in range(1, 5) if said[place] not in said[:place])
    model.generation_config.eos_token_id = int(said[place])
    model.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    settings = Settings(num_samples=1, max_new_tokens=place + 1, num_kl_rows=1)
    found = compared(*[str(tmp_path / "ends")] * 2, rows, settings, lambda scores: [])
    assert found.samples[0].was_cut == (False, False)
    assert found.samples[0].num_tokens == (place, place)


def test_messages_name_the_split(models: Any, tmp_path: Path, capsys: Any) -> None:
    broken = {**standard_rows(3), "chosen": ["baba", None, "baba"]}
    Dataset.from_dict(broken).to_json(tmp_path / "test.jsonl")
    assert main(["compare", models["base"], models["other"], "--dataset_name", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "test data, row 1" in printed
    assert "train data" not in printed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num_samples", "-1"),
        ("--num_kl_rows", "-1"),
        ("--max_length", "0"),
        ("--max_length", "-3"),
        ("--max_rows", "0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_the_work(option: str, value: str, capsys: Any) -> None:
    assert main(["compare", "nowhere", "nowhere", "--dataset_name", "nowhere", option, value]) == 2
    assert f"{option} {value}: must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(option: str, tmp_path: Path, capsys: Any) -> None:
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "nowhere" / "x", "there is no folder")):
        assert main(["compare", "nowhere", "nowhere", "--dataset_name", "nowhere", option, str(path)]) == 2
        printed = capsys.readouterr().err
        assert f"{option} {path}" in printed
        assert why in printed
