"""`prefopt quickstart` with the real trainer."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli.main import main
from prefopt.cli.main import main as prefopt
from prefopt.quickstart import ASSETS, preference_set
from prefopt.quickstart import run as quickstart_run
from prefopt.quickstart.measure import Measured, measure
from prefopt.quickstart.report import CurvePoint, Outcome, examples, markdown, next_commands
from prefopt.quickstart.task import parse

OFFLINE = """
import socket, sys
def refuse(self, address): raise AssertionError(f"network: {address}")
socket.socket.connect = refuse
from prefopt.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of 27 steps, which is too short to learn anything; and what it prints."""
    text = io.StringIO()
    folder = tmp_path_factory.mktemp("small") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_REPORT", "on")
        outcome = quickstart_run.run(1, folder, num_pairs=144, num_held_out=12, console=Console(file=text, width=120))
    return outcome, text.getvalue()


def test_run_leaves_models_rows_and_report(small):
    outcome, _ = small
    folder = outcome.output_dir
    assert {path.name for path in folder.iterdir()} == {"base", "model", "train.jsonl", "held_out.jsonl", "report.md"}
    base, shipped, trained = (load_file(f / "model.safetensors") for f in (folder / "base", ASSETS, folder / "model"))
    assert all(torch.equal(base[name], shipped[name]) for name in shipped)
    assert any(not torch.equal(trained[name], shipped[name]) for name in shipped)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert rows == preference_set("train", 144, seed=1).to_list()


def test_run_prints_before_steps_after_and_what_failed(small):
    outcome, text = small
    assert text.count("generated answer is right") == 2
    assert text.count("\n  before  ") == 3 * 2
    assert text.count("\n  after   ") == 3
    assert "step   25 of 27" in text
    assert "It did not work" in text
    assert not outcome.has_risen
    assert str(outcome.output_dir / "report.md") in text
    assert str(outcome.output_dir / "model" / "report.html") in text
    assert (outcome.output_dir / "model" / "report.html").is_file()


def test_saved_model_is_the_measured_one(small):
    outcome, _ = small
    folder = outcome.output_dir / "model"
    rows = preference_set("held_out", 12, seed=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert measure(model, tokenizer, rows) == outcome.after


def test_next_command_runs_on_what_the_quickstart_leaves(small):
    outcome, _ = small
    program, *arguments = shlex.split(" ".join(next_commands(outcome)))
    assert program == "prefopt"
    assert prefopt([*arguments, "--max_steps", "1", "--report_to", "none"]) == 0
    assert (outcome.output_dir.with_name("my-first-run") / "model.safetensors").exists()


@pytest.mark.slow
def test_quickstart_learns_offline_and_writes_nowhere_else(tmp_path):
    """The command as a user runs it: held-out accuracy from about 0.5 to above 0.9, exit status 0."""
    home = tmp_path / "home"
    home.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "quickstart"],
        cwd=here,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both shares rose above 90%" in done.stdout
    assert [path.relative_to(here).as_posix() for path in here.glob("*/*")] == ["runs/quickstart"]
    assert [path for path in home.rglob("*") if path.is_file()] == []
    folder = here / "runs" / "quickstart"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(ASSETS)
    rows = preference_set("held_out", 300, seed=7)
    after = measure(model, tokenizer, rows)
    assert min(after.accuracy, after.pass_rate) > 0.9


def outcome_with(before: Measured, after: Measured) -> Outcome:
    prompts = tuple(preference_set("held_out", 6)["prompt"])
    curve = (CurvePoint(25, 0.5, 0.75),)
    return Outcome(0, Path("out"), quickstart_run.SETTINGS, 6, prompts, before, after, curve, 1.0, 2.0)


LOW = Measured(0.5, 0.5, -1.0, -1.0, (" MOTH GOAT ANT",) * 6)
HIGH = Measured(0.95, 0.95, -0.1, -9.0, (" ant goat moth",) * 6)


@pytest.mark.parametrize(
    ("before", "after", "has_risen"),
    [
        (LOW, HIGH, True),
        (LOW, LOW, False),
        (HIGH, HIGH, False),
        (LOW, dataclasses.replace(HIGH, accuracy=0.9), False),
        (LOW, dataclasses.replace(HIGH, pass_rate=0.4), False),
    ],
)
def test_exit_status_says_whether_both_shares_rose(before, after, has_risen, tmp_path, monkeypatch):
    outcome = outcome_with(before, after)
    monkeypatch.setattr(quickstart_run, "run", lambda seed, output_dir: outcome)
    assert outcome.has_risen == has_risen
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == (0 if has_risen else 1)


def test_examples_are_the_first_wrong_of_each_family():
    prompts = tuple(preference_set("held_out", 24)["prompt"])
    wrong = [1, 6, 3, 8, 17]  # rows 0, 1, 6 are of the first family, 3 and 8 of the second, 17 of the third
    answers = tuple("" if row in wrong else parse(prompt).right for row, prompt in enumerate(prompts))
    assert examples(prompts, dataclasses.replace(LOW, answers=answers)) == (1, 3, 17)
    assert examples(prompts, dataclasses.replace(LOW, answers=tuple(parse(p).right for p in prompts))) == (0, 2, 4)


def test_report_has_the_figures_answers_curve_and_settings():
    lines = markdown(outcome_with(LOW, HIGH)).splitlines()
    assert "| preferred answer is the likelier | 50.0% | 95.0% |" in lines
    assert "| mean log p(rejected), nats | -1.00 | -9.00 |" in lines
    assert "| Sort ascending: moth goat ant | ant goat moth | MOTH GOAT ANT (wrong) | ant goat moth (right) |" in lines
    assert "| 25 | 0.500 | 0.750 |" in lines
    assert "| `beta` | `0.5` |" in lines


def test_folder_that_cannot_be_made_is_a_message(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["quickstart", "--output_dir", str(tmp_path / "taken")]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_gold_rows_train_tpo(tmp_path):
    """Four steps of TPO move the model towards the gold answers."""
    from prefopt import TPOConfig, TPOTrainer

    rows = preference_set("train", 24, gold=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ASSETS), AutoTokenizer.from_pretrained(ASSETS)
    gold = rows.select_columns(["prompt", "rejected"]).add_column("chosen", rows["reference"])
    before = measure(model, tokenizer, gold)
    config = TPOConfig(str(tmp_path), learning_rate=1e-4, max_steps=4, report_to="none", save_strategy="no", bf16=False)
    TPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer).train()
    assert measure(model, tokenizer, gold).chosen_logp > before.chosen_logp
