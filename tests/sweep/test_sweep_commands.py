"""Commands from a second terminal: answered while a sweep runs, and done where nobody runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sweeps import MAX_STEPS, Formula, sweep_of, trial, write_rows

from prefopt.checkpoints.manifest import faults, write_manifest
from prefopt.sweep import scheduler
from prefopt.sweep.commands import Request, answer, apply, ask, pending, wait_for_answer
from prefopt.sweep.scheduler import Hooks, run_sweep
from prefopt.sweep.state import Status, Sweep, Trial, read_events, read_sweep, trial_folder

STEPS = 5
"""Of a chunk: an eighth of `MAX_STEPS`."""


@pytest.fixture
def formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Formula:
    made = Formula(lambda options, step: step * float(options["beta"]))
    made.folder = tmp_path
    monkeypatch.setattr(scheduler, "train_chunk", made.train_chunk)
    return made


def new(*names: str) -> Sweep:
    return sweep_of([trial(name, Status.WAITING, steps=0, max_steps=None) for name in names])


def write_checkpoint(folder: Path, name: str, step: int) -> Path:
    """A checkpoint that is whole, of a file."""
    checkpoint = trial_folder(folder, name) / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("weights")
    write_manifest(checkpoint, step, "run")
    return checkpoint


def run_with(folder: Path, formula: Formula, sweep: Sweep, requests: dict[tuple[str, int], Request]) -> tuple:
    """Run to the end; at a step of a trial a request comes. Returns the end, the answers and the shown states."""
    asked: dict[str, str] = {}
    shown: list[Sweep] = []

    def watch(now: Sweep, name: str | None) -> None:
        shown.append(now)
        for (who, step), request in requests.items():
            if name == who and now.trial(who).steps == step and request.command not in asked:
                asked[request.command] = ask(folder, request)

    end = run_sweep(folder, sweep, formula.make, Hooks(watch=watch), max_at_once=8)
    return end, {command: wait_for_answer(folder, name, 1.0) for command, name in asked.items()}, shown


# -- turns -------------------------------------------------------------------------------------------------------------


def test_trials_take_turns_in_rounds(tmp_path: Path, formula: Formula) -> None:
    end = run_sweep(tmp_path, new("a", "b", "c"), formula.make, Hooks(), max_at_once=2)
    chunks = [(event["trial"], event["step"]) for event in read_events(tmp_path) if event["event"] == "chunk"]
    assert chunks[:4] == [("a", 0), ("b", 0), ("a", 5), ("b", 5)]
    assert chunks[14:18] == [("a", 35), ("b", 35), ("c", 0), ("c", 5)], "the third waits for a place"
    assert [one.status for one in end.trials] == [Status.FINISHED] * 3
    assert [one.steps for one in end.trials] == [MAX_STEPS] * 3
    assert read_sweep(tmp_path) == end


def test_what_stands_on_the_disk_is_what_is_shown(tmp_path: Path, formula: Formula) -> None:
    end = run_sweep(tmp_path, new("a"), formula.make, Hooks(), max_at_once=1)
    (one,) = end.trials
    assert one.last == one.best == MAX_STEPS * 0.1
    found = json.loads((tmp_path / "sweep.json").read_text())["trials"][0]
    assert (found["status"], found["last"], found["turn"]) == ("finished", one.last, 8)


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_another_trial_is_stopped_at_the_next_step(tmp_path: Path, formula: Formula) -> None:
    requests = {("b", 3): Request("stop", "a")}
    end, answers, shown = run_with(tmp_path, formula, new("a", "b"), requests)
    assert answers == {"stop": ("a: stopped after step 5", True)}
    assert [(one.status, one.steps) for one in end.trials] == [(Status.STOPPED, 5), (Status.FINISHED, MAX_STEPS)]
    when = next(now for now in shown if now.trial("a").status is Status.STOPPED)
    assert when.trial("b").steps == 3, "not at the end of the chunk"


def test_the_trial_that_is_trained_ends_its_chunk_for_a_command(tmp_path: Path, formula: Formula) -> None:
    end, answers, _ = run_with(tmp_path, formula, new("a", "b"), {("a", 7): Request("stop", "a")})
    assert answers == {"stop": ("a: stopped after step 7", True)}, "within its chunk"
    found = end.trial("a")
    assert (found.status, found.steps, found.reason) == (Status.STOPPED, 7, "stopped by a command")
    assert not pending(tmp_path)
    assert list((tmp_path / "commands").iterdir()) == []


def test_a_stopped_trial_goes_on_when_it_is_resumed(tmp_path: Path, formula: Formula) -> None:
    requests = {("a", 5): Request("stop", "a"), ("b", 25): Request("resume", "a")}
    end, answers, _ = run_with(tmp_path, formula, new("a", "b"), requests)
    assert answers["resume"] == ("a: goes on from step 5 when its turn comes", True)
    assert [(one.status, one.steps) for one in end.trials] == [(Status.FINISHED, MAX_STEPS)] * 2
    assert end.trial("a").spared


def test_a_failed_trial_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    sweep = sweep_of([trial(name, Status.FAILED, steps=13, reason="NonFiniteStepError") for name in ("a", "b")])
    write_checkpoint(tmp_path, "a", 10)
    for name, steps, status, how in (
        ("a", 10, Status.PAUSED, "goes on from step 10"),
        ("b", 0, Status.WAITING, "begins anew"),
    ):
        after, text = apply(tmp_path, sweep, Request("resume", name), lambda options: [])
        assert text == f"{name}: {how} when its turn comes"
        assert (after.trial(name).steps, after.trial(name).status) == (steps, status)


def test_a_clone_goes_on_from_the_newest_checkpoint(tmp_path: Path, formula: Formula) -> None:
    write_checkpoint(tmp_path, "a", 5)
    newest = write_checkpoint(tmp_path, "a", 10)
    (write_checkpoint(tmp_path, "a", 15) / "model.safetensors").write_text("damaged")
    request = Request("clone", "a", {"beta": 0.7, "learning_rate": 1e-5})
    end, answers, _ = run_with(tmp_path, formula, new("a", "b"), {("b", 12): request})
    clone = end.trials[-1]
    assert clone.name == "03-beta0.7-lr1e-5-froma"
    assert answers["clone"] == (f"{clone.name}: goes on from step 10 of a when its turn comes", True)
    assert (clone.cloned_from, clone.clone_step, clone.status) == ("a", 10, Status.FINISHED)
    assert clone.options == {"beta": 0.7, "learning_rate": 1e-5}
    of_clone = [event for event in read_events(tmp_path) if event["trial"] == clone.name]
    assert [event["event"] for event in of_clone[:2]] == ["clone", "chunk"]
    assert of_clone[1]["step"] == 10
    assert newest.is_dir(), "the original's own"


def test_a_clone_may_begin_anew(tmp_path: Path, formula: Formula) -> None:
    write_checkpoint(tmp_path, "a", 10)
    request = Request("clone", "a", {"seed": 3}, from_scratch=True)
    end, _, _ = run_with(tmp_path, formula, new("a"), {("a", 12): request})
    assert (end.trials[-1].clone_step, end.trials[-1].options) == (0, {"beta": 0.1, "seed": 3})
    assert not list(trial_folder(tmp_path, end.trials[-1].name).glob("checkpoint-*"))


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown trial": (Request("stop", "x"), "has no trial 'x'; it has:\n  a\n  f"),
    "a stop of what is over": (Request("stop", "f"), "f is finished already"),
    "a resume of what is finished": (Request("resume", "f"), "clone it with a larger max_steps"),
    "a resume of what runs": (Request("resume", "a"), "a is paused: it goes on by itself"),
    "a clone without a checkpoint": (Request("clone", "a", {"beta": 1.0}), "no checkpoint yet; --from_scratch"),
    "a clone with a wrong option": (Request("clone", "a", {"beta": -1}), "beta=-1: must be positive"),
    "a clone with an option of the sweep": (Request("clone", "a", {"output_dir": "x"}), "output_dir: each trial has"),
    "a clone with an option of the process": (Request("clone", "a", {"tf32": True}), "acts on the whole process"),
    "a clone with a secret": (Request("clone", "a", {"hub_token": "hf_abcdefghijkl"}), "one of these is a secret"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_that_cannot_be_done_says_why(case: str, tmp_path: Path) -> None:
    request, message = REFUSED[case]
    sweep = sweep_of([trial("a"), trial("f", Status.FINISHED)])
    check = lambda options: ["beta=-1: must be positive"] if options.get("beta") == -1 else []  # noqa: E731
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(tmp_path, sweep, request, check)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_secret_is_in_no_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="secret"):
        ask(tmp_path, Request("clone", "a", {"hub_token": "hf_abcdefghijkl"}))
    assert not (tmp_path / "commands").exists()


def test_a_refusal_reaches_the_other_terminal(tmp_path: Path, formula: Formula) -> None:
    end, answers, _ = run_with(tmp_path, formula, new("a"), {("a", 3): Request("resume", "a")})
    assert answers["resume"] == ("a is paused: it goes on by itself", False)
    assert end.trial("a").status is Status.FINISHED


def test_no_answer_is_none(tmp_path: Path) -> None:
    assert wait_for_answer(tmp_path, ask(tmp_path, Request("stop", "a")), 0.1) is None
    (request,) = pending(tmp_path)
    answer(tmp_path, request, "done", is_done=True)
    assert wait_for_answer(tmp_path, request.name, 1.0) == ("done", True)


def test_what_is_no_request_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    for number, text in enumerate(["", "[1]", '{"command": "stop"}', '{"x": 1}']):
        (tmp_path / "commands" / f"{number}.request.json").write_text(text)
    assert pending(tmp_path) == []
    assert list((tmp_path / "commands").iterdir()) == []


# -- where nobody runs it ----------------------------------------------------------------------------------------------


def test_a_clone_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt import files

    write_checkpoint(tmp_path, "a", 10)
    sweep = sweep_of([trial("a")])

    def killed(operation: str, path: Path) -> None:
        if operation == "rename":
            raise KeyboardInterrupt

    request = Request("clone", "a", {"beta": 0.2})
    with files.observed(killed), pytest.raises(KeyboardInterrupt):
        apply(tmp_path, sweep, request, lambda options: [])
    clone = trial_folder(tmp_path, "02-beta0.2-froma")
    assert not list(clone.glob("checkpoint-*"))
    after, _ = apply(tmp_path, sweep, request, lambda options: [])
    assert after.trials[-1].name == clone.name
    assert not faults(clone / "checkpoint-10")


def test_commands_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli.main import main
    from prefopt.quickstart import ASSETS
    from prefopt.sweep.state import write_sweep

    run = f"run: {{model_name_or_path: {ASSETS}, dataset_name: {tmp_path}}}"
    (tmp_path / "sweep.yaml").write_text(f"{run}\noutput_dir: x\ntrials: [{{beta: 0.1}}]\n")
    folder = tmp_path / "sweep"
    write_rows(folder, "a", [{"step": 5, "loss": 0.5}])
    state: dict[str, Any] = {"source": str(tmp_path / "sweep.yaml"), "method": "dpo", "metric": "eval_loss"}
    write_sweep(folder, Sweep(**state, trials=(Trial("a", {"beta": 0.1}, Status.PAUSED, steps=5, max_steps=40),)))
    assert main(["sweep", "stop", str(folder), "a"]) == 0
    assert "a: stopped after step 5\nNobody runs this sweep now" in capsys.readouterr().out
    assert main(["sweep", "ls", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "a stopped: stopped by a command\nNobody runs this sweep now" in shown
    assert main(["sweep", "resume", str(folder), "a"]) == 0
    assert read_sweep(folder).trial("a").status is Status.PAUSED  # type: ignore[union-attr]
    assert main(["sweep", "clone", str(folder), "a", "--set", "beta=-1", "--from_scratch"]) == 2
    assert "beta" in capsys.readouterr().err
    assert main(["sweep", "clone", str(folder), "a", "--set", "beat=1", "--from_scratch"]) == 2
    assert "did you mean 'beta'?" in capsys.readouterr().err
    assert main(["sweep", "clone", str(folder), "a"]) == 2
    assert "say what changes" in capsys.readouterr().err
    assert main(["sweep", "clone", str(folder), "a", "--set", "beta=0.3", "--from_scratch"]) == 0
    assert read_sweep(folder).trials[-1].options == {"beta": 0.3}  # type: ignore[union-attr]
