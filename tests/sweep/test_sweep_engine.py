"""Trials that take turns give what each gives alone, and share what they have in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.cli.main import main
from prefopt.quickstart import ASSETS, preference_set
from prefopt.sweep.state import Status, read_events, read_sweep, trial_folder

TIMED = ("time", "flos", "per_second", "runtime")
ADAPTERS: list[dict[str, Any]] = [
    {"beta": 0.5},
    {"learning_rate": 1e-2, "lr_scheduler_type": "cosine"},
    {"lora_r": 2, "lora_target_modules": ["q_proj"]},
    {"lora_r": 8, "lora_target_modules": ["q_proj", "down_proj"], "lora_alpha": 4},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    {"loss_type": "ipo", "lora_dropout": 0.1, "disable_dropout": False},
    {"seed": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"max_steps": 9, "use_dora": True, "weight_decay": 0.1, "max_grad_norm": 0.1},
]
LONGEST_WAIT = 300.0
"""Seconds for a process to start and train 16 tiny steps, on a machine that does other things, too."""
WHOLE: list[dict[str, Any]] = [{"use_peft": False}, {"use_peft": False, "beta": 1.0, "sync_ref_model": True}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    preference_set("train", 30).to_json(folder / "train.jsonl")
    preference_set("held_out", 10).to_json(folder / "test.jsonl")
    return folder


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_REPORT", "off")


def write_sweep_file(path: Path, data: Path, trials: list[dict[str, Any]], **keys: Any) -> Path:
    run = {
        "model_name_or_path": str(ASSETS),
        "dataset_name": str(data),
        "learning_rate": 1e-3,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "report_to": "none",
        "bf16": False,
        **keys.pop("run", {}),
    }
    content = {"run": run, "output_dir": str(path / "sweep"), "trials": trials, "chunk_steps": 4, **keys}
    (path / "sweep.yaml").write_text(yaml.safe_dump(content))
    return path / "sweep.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMED)} for row in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    adapter = run / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    assert rows(first) == rows(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "lora_B" in name or "model" in name)


# -- the same result as alone ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Path]:
    """The folder of a sweep of all kinds of trials on one base model."""
    path = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_REPORT", "off")
        patch.setenv("PREFOPT_CACHE", str(path / "cache"))
        file = write_sweep_file(path, data, [*ADAPTERS, *WHOLE], max_at_once=10)
        assert main(["sweep", str(file)]) == 0
        yield path / "sweep"


@pytest.mark.parametrize("number", range(len(ADAPTERS) + len(WHOLE)))
def test_a_trial_gives_what_it_gives_alone(
    swept: Path, number: int, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    sweep = read_sweep(swept)
    assert sweep is not None
    run = trial_folder(swept, sweep.trials[number].name)
    assert main(["train", str(run / "run.yaml"), "--output_dir", str(tmp_path / "alone")]) == 0
    assert_same_run(run, tmp_path / "alone")


def test_the_user_may_evaluate_by_epochs_and_pause_anywhere(
    data: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 steps an epoch; chunks of 3 and of 1 end within epochs, at their ends, and after the last one. Samples are in
    their file alone."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    run = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    run |= {"generate_during_eval": True, "num_eval_samples": 1, "eval_sample_tokens": 2}
    file = write_sweep_file(tmp_path, data, [{"beta": 0.3}], chunk_steps=3, run=run)
    assert main(["sweep", str(file)]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"01-beta0.3"}
    assert (tmp_path / "sweep" / "trials" / "01-beta0.3" / "samples.jsonl").is_file()
    trial = trial_folder(tmp_path / "sweep", "01-beta0.3")
    assert main(["train", str(trial / "run.yaml"), "--output_dir", str(tmp_path / "alone")]) == 0
    assert_same_run(trial, tmp_path / "alone")
    assert [row["step"] for row in rows(trial) if "eval_loss" in row] == [8, 16]
    assert {path.name for path in trial.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16"}


def test_a_clone_is_the_run_that_goes_on_with_changes(
    data: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    file = write_sweep_file(tmp_path, data, [{"beta": 0.1}], run={"max_steps": 5})
    assert main(["sweep", str(file)]) == 0
    folder = str(tmp_path / "sweep")
    assert main(["sweep", "clone", folder, "01-beta0.1", "--set", "beta=0.9", "max_steps=8"]) == 0
    assert main(["sweep", str(file)]) == 0
    original, clone = (trial_folder(Path(folder), name) for name in ("01-beta0.1", "02-beta0.9-max_steps8-from01"))
    going_on = ["--resume_from_checkpoint", str(original / "checkpoint-5"), "--allow_changes"]
    assert main(["train", str(clone / "run.yaml"), "--output_dir", str(tmp_path / "alone"), *going_on]) == 0
    assert_same_run(clone, tmp_path / "alone")
    assert {row["step"] for row in rows(clone)} == {6, 8}
    assert not torch.equal(*(next(iter(weights(run).values())) for run in (original, clone)))


def test_a_clone_of_another_trial_disturbs_no_run(
    data: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options are checked, which makes a config, while another trial is within its chunk."""
    from prefopt.sweep.commands import Request, ask, wait_for_answer
    from prefopt.sweep.table import Display

    file = write_sweep_file(tmp_path, data, [{"beta": 0.1}, {"beta": 0.5}], run={"max_steps": 6, "eval_steps": 2})
    folder, update, asked = tmp_path / "sweep", Display.update, []

    def updated(self: Display, sweep: Any, name: str | None = None) -> None:
        update(self, sweep, name)
        if not asked and sweep.trials[1].steps == 2:
            for beta in (0.9, -1.0):
                asked.append(ask(folder, Request("clone", "01-beta0.1", {"beta": beta})))

    monkeypatch.setattr(Display, "update", updated)
    assert main(["sweep", str(file)]) == 0
    answers = [wait_for_answer(folder, name, 1.0) for name in asked]
    assert [is_done for _, is_done in answers if answers] == [True, False]  # type: ignore[misc]
    assert "beta=-1" in answers[1][0]  # type: ignore[index]
    assert [trial.status for trial in read_sweep(folder).trials] == [Status.FINISHED] * 3  # type: ignore[union-attr]
    trial = trial_folder(folder, "02-beta0.5")
    assert main(["train", str(trial / "run.yaml"), "--output_dir", str(tmp_path / "alone")]) == 0
    assert_same_run(trial, tmp_path / "alone")


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_all_curves_come_before_any_is_whole(swept: Path) -> None:
    sweep = read_sweep(swept)
    assert sweep is not None
    order = [(event["event"], event["trial"]) for event in read_events(swept) if event["event"] != "chunk"]
    names = [trial.name for trial in sweep.trials]
    assert [name for what, name in order[: len(names)]] == names, "the first round"
    assert {what for what, _ in order[: len(names)]} == {"paused"}
    seen = [trial.first_seen for trial in sweep.trials]
    assert None not in seen
    assert seen == sorted(seen, key=float)  # type: ignore[arg-type]
    assert all(trial.status is Status.FINISHED and trial.steps == trial.max_steps for trial in sweep.trials)


def test_no_checkpoint_of_a_pause_is_left(swept: Path) -> None:
    for run in (swept / "trials").iterdir():
        steps = [int(path.name.partition("-")[2]) for path in run.glob("*checkpoint-*")]
        assert steps == [json.loads((run / "run.json").read_text())["steps"]], "the last, which every run saves"


def test_what_trials_have_in_common_is_made_once(
    data: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 pairs and 10 for evaluation: the reference scores each once, whoever asks first; no row is encoded twice."""
    import prefopt.sweep.chunks as chunks
    from prefopt.data import prepare
    from prefopt.reference.remembered import Remembered

    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    scored: list[int] = []
    counted: dict[str, int] = {"models": 0, "sets": 0}
    settle = Remembered.settle

    def settled(self: Remembered) -> None:
        scored.extend(row for one in self.scored for row in one.rows)
        settle(self)

    def count(what: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counted[what] += 1
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(Remembered, "settle", settled)
    monkeypatch.setattr(chunks, "load_model", count("models", chunks.load_model))
    monkeypatch.setattr(prepare, "_prepare_rows", count("sets", prepare._prepare_rows))
    trials = [{"beta": 0.1}, {"beta": 0.5}, {"lora_r": 2}]
    file = write_sweep_file(tmp_path, data, trials, run={"max_steps": 8})
    assert main(["sweep", str(file)]) == 0
    assert len(scored) == 40
    assert counted == {"models": 1, "sets": 2}


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_trial_that_fails_leaves_the_others_alone(data: Path, tmp_path: Path, quiet: None) -> None:
    trials = [{"beta": 0.1}, {"learning_rate": 1e30, "on_nonfinite": "stop"}, {"beta": 0.5}]
    file = write_sweep_file(tmp_path, data, trials, run={"max_steps": 6, "max_grad_norm": 0.0})
    assert main(["sweep", str(file)]) == 1
    sweep = read_sweep(tmp_path / "sweep")
    assert sweep is not None
    first, second, third = sweep.trials
    assert (first.status, second.status, third.status) == (Status.FINISHED, Status.FAILED, Status.FINISHED)
    assert str(second.reason).startswith("NonFiniteStepError: ")


def test_ctrl_c_leaves_a_sweep_that_goes_on(
    data: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefopt.sweep.table import Display

    file = write_sweep_file(tmp_path, data, [{"beta": 0.1}, {"beta": 0.5}], run={"max_steps": 6})
    update, asked = Display.update, []

    def updated(self: Display, sweep: Any, name: str | None = None) -> None:
        update(self, sweep, name)
        if not asked and sweep.trials[1].steps == 2:
            asked.append(signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(Display, "update", updated)
    assert main(["sweep", str(file)]) == 130
    assert f"to go on: prefopt sweep {file}" in capsys.readouterr().out
    sweep = read_sweep(tmp_path / "sweep")
    assert sweep is not None
    assert [(trial.status, trial.steps) for trial in sweep.trials] == [(Status.PAUSED, 4), (Status.PAUSED, 3)]
    assert main(["sweep", str(file)]) == 0
    trial = trial_folder(tmp_path / "sweep", "02-beta0.5")
    assert main(["train", str(trial / "run.yaml"), "--output_dir", str(tmp_path / "alone")]) == 0
    assert_same_run(trial, tmp_path / "alone")


def test_a_sweep_that_was_killed_goes_on(data: Path, tmp_path: Path, quiet: None) -> None:
    file = write_sweep_file(tmp_path, data, [{"beta": 0.1}, {"beta": 0.5}], run={"max_steps": 20})
    code = "import sys; from prefopt.cli.main import main; main(['sweep', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.DEVNULL)
    folder, end = tmp_path / "sweep", time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end:
        sweep = read_sweep(folder)
        is_far = sweep is not None and min(trial.steps for trial in sweep.trials) >= 8
        if is_far and Status.RUNNING in [trial.status for trial in sweep.trials]:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = read_sweep(folder)
    assert killed is not None
    assert all(8 <= trial.steps < 20 for trial in killed.trials)
    assert main(["sweep", str(file)]) == 0
    for trial in killed.trials:
        run, alone = trial_folder(folder, trial.name), tmp_path / trial.name
        assert main(["train", str(run / "run.yaml"), "--output_dir", str(alone)]) == 0
        assert_same_run(run, alone)
