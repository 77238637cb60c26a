"""The twelve bad inputs of preference training: each one message with row or option and fix, from run and from check.

A model or a library meets them with a traceback or with silence; here nothing is silent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from short_runs import dataset, weights
from tiny_models import tiny_model, word_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from prefopt import DPOConfig, DPOTrainer
from prefopt.cli.main import main
from prefopt.quickstart import ASSETS, preference_set

BAD = 3
"""The row that is made bad."""
NUM_ROWS = 16

Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """A bad input, and what is said of it."""

    options: dict[str, Any]
    """Of the run, beside the usual ones."""
    spoil: Callable[[Rows], Any]
    """Makes the rows bad, in place."""
    status: tuple[int, int]
    """Of the run, of the check."""
    run: Sequence[str]
    check: Sequence[str]
    """Patterns that stand in one line, in this order: where, what, what to do."""


def row(**values: Any) -> Callable[[Rows], Any]:
    return lambda rows: rows[BAD].update(values)


def rename(rows: Rows) -> None:
    for item in rows:
        item["choosen"] = item.pop("chosen")


def lengthen(rows: Rows) -> None:
    for item in rows:
        item["prompt"] *= 100


def good(rows: Rows) -> None:
    pass


NONE = ["train data, row 3, column 'chosen'", "the value is None", "Fill the value in or drop the row"]
NUMBER = ["train data, row 3, column 'rejected'", "got int 7", "Convert the column to text"]
COLUMN = ["train data: ", "no column 'chosen'", "Did you mean 'choosen'", "Rename yours"]
BETA = ["beta=-1.0 must be a number above 0", "set for example 0.1"]
SMOOTHING = ["label_smoothing=0.7 must lie in", "set for example 0.1"]
EMPTY_SET = ["rows.jsonl: the data set is empty", "Give one with at least one row"]
TOO_LONG = ["train data: ", "none of the 16 rows", "within max_length", "rows 0, 1, 2", "Raise max_length"]
CONTEXT = ["1 of 16 rows", "context of 256 tokens", r"\(row 3\)", "Set max_length=256"]
DIVERGED = ["Step 2", "gradient norm is nan", "Lower `learning_rate`"]
PAD = [r"pad token is the EOS token \(</s>\)", "harmless"]

CASES = {
    "wrong_column": Case({}, rename, (2, 1), COLUMN, ["error: ", *COLUMN]),
    "none": Case({}, row(chosen=None), (2, 1), NONE, ["error: ", *NONE]),
    "number": Case({}, row(rejected=7), (2, 1), NUMBER, ["error: ", *NUMBER]),
    "identical_pair": Case(
        {},
        lambda rows: rows[BAD].update(rejected=rows[BAD]["chosen"]),
        (0, 0),
        ["train data: skipped 1 of 16 rows: chosen equal to rejected", r"\(row 3\)"],
        ["warning: train data, row 3: ", "chosen equal to rejected", "drop the row"],
    ),
    "empty_side": Case(
        {},
        row(chosen=" "),
        (0, 0),
        ["train data: skipped 1 of 16 rows: empty completion", r"\(row 3\)"],
        ["warning: train data, row 3: ", "empty completion", "drop the row"],
    ),
    "empty_set": Case({}, lambda rows: rows.clear(), (2, 1), EMPTY_SET, [r"error: .*run.yaml:\d+: ", *EMPTY_SET]),
    "all_too_long": Case({}, lengthen, (2, 1), TOO_LONG, ["error: ", *TOO_LONG]),
    "context_exceeded": Case(
        {"max_length": None},
        lambda rows: rows[BAD].update(prompt=rows[BAD]["prompt"] * 60),
        (0, 0),
        ["train data: ", *CONTEXT],
        ["warning: train data: ", *CONTEXT],
    ),
    "beta": Case({"beta": -1.0}, good, (2, 1), BETA, [r"error: .*run.yaml:1: ", *BETA]),
    "smoothing": Case(
        {"loss_type": "robust", "label_smoothing": 0.7}, good, (2, 1), SMOOTHING, [r"error: .*run.yaml:2: ", *SMOOTHING]
    ),
    "divergence": Case({"learning_rate": 1e6}, good, (2, 1), DIVERGED, [r"error: .*run.yaml:1: ", *DIVERGED]),
    "pad_is_eos": Case({"model_name_or_path": "model"}, good, (0, 0), PAD, ["note: ", *PAD]),
}


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_each_is_one_message_with_place_and_fix(name, in_a_folder, capsys, caplog):
    case = CASES[name]
    write_run(in_a_folder, case)
    assert main(["check", "run.yaml"]) == case.status[1]
    checked = capsys.readouterr().out
    assert len(lines_with(checked, case.check)) == 1, checked
    assert not Path("out").exists()
    caplog.clear()
    assert main(["train", "run.yaml"]) == case.status[0]
    said = capsys.readouterr()
    run = "\n".join([said.out, said.err, *(record.getMessage() for record in caplog.records)])
    found = lines_with(run, case.run)
    assert found, run
    assert len({line.removeprefix("prefopt: ").removeprefix("DPOConfig: ") for line in found}) == 1, run
    assert "Traceback" not in run
    if case.status[0]:
        assert "skipped" not in run, "the same rows are not told of twice"


def write_run(folder: Path, case: Case) -> None:
    rows = [dict(item) for item in preference_set("train", NUM_ROWS)]
    case.spoil(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    if "model_name_or_path" in case.options:
        LlamaForCausalLM.from_pretrained(ASSETS).save_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(ASSETS)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder / "model")
    usual = {
        "model_name_or_path": str(ASSETS),
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({**case.options, **{**usual, **case.options}}, sort_keys=False))


def lines_with(text: str, patterns: Sequence[str]) -> list[str]:
    """The lines in which the patterns stand one after another; the fix of a check begins with a capital letter."""
    whole = re.compile(".*".join(patterns), re.IGNORECASE)
    return [line for line in text.splitlines() if whole.search(line)]


def test_a_pad_token_that_is_the_eos_token_changes_nothing(tmp_path):
    """Padding is masked by place: the weights after two steps are those with another pad token, bit for bit."""
    trained = []
    for pad in ("</s>", "<unk>"):
        tokenizer = word_tokenizer()
        tokenizer.pad_token = pad
        options = {"layout": "padded", "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True}
        args = DPOConfig(str(tmp_path / pad.strip("</>")), report_to="none", **options)
        run = DPOTrainer(tiny_model(seed=1), args=args, train_dataset=dataset(), processing_class=tokenizer)
        run.train()
        trained.append(weights(run.model))
    assert torch.equal(*trained)
