"""The file of a sweep: which trials it makes, under which names, and what is said of its mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import write_rows

from prefopt.cli import sweep as command
from prefopt.cli.main import main
from prefopt.cli.sweep_file import SweepFile, read_sweep_file
from prefopt.quickstart import ASSETS
from prefopt.sweep.plan import trial_name
from prefopt.sweep.scheduler import chunk_size
from prefopt.sweep.state import Status, Sweep, Trial, read_sweep, write_sweep

RUN = {"model_name_or_path": str(ASSETS), "dataset_name": "data", "beta": 0.1, "report_to": "none", "bf16": False}


def begun(file: SweepFile) -> Sweep:
    return command.begun(file, command.planned(file))


def sweep_file(folder: Path, **keys: Any) -> str:
    content = {"run": RUN, "output_dir": str(folder / "sweep"), **keys}
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "sweep.yaml")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 0.1, "learning_rate": 1e-5}, "03-beta0.1-lr1e-5"),
        ({"learning_rate": "5e-07", "max_steps": 1000}, "03-lr5e-7-max_steps1000"),
        ({"loss_type": ["sigmoid", "sft"], "use_peft": True}, "03-loss_typesigmoid+sft-use_peftTrue"),
        ({"lora_target_modules": "a/../b\x1b[31m c"}, "03-lora_target_modulesa_.._b__31m_c"),
        ({"run_name": "x" * 200}, "03-run_name" + "x" * 69),
    ],
)
def test_a_name_says_what_a_trial_has_of_its_own(options: dict[str, Any], name: str) -> None:
    assert trial_name(3, options) == name


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, parameters={"beta": [0.1, 0.5], "learning_rate": ["1e-5", 1e-4]})
    trials = begun(read_sweep_file(file)).trials
    assert [trial.name for trial in trials] == [
        "01-beta0.1-lr1e-5",
        "02-beta0.1-lr0.0001",
        "03-beta0.5-lr1e-5",
        "04-beta0.5-lr0.0001",
    ]
    assert {trial.status for trial in trials} == {Status.WAITING}


def test_the_run_may_stand_in_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"method": "cpo", **RUN, "output_dir": "elsewhere"}))
    file = read_sweep_file(sweep_file(tmp_path, run="base.yaml", trials=[{"cpo_alpha": 0.0, "loss_type": "simpo"}]))
    _, training, model, _ = file.configs(file.plan.trials[0], tmp_path / "trial")
    assert (training.loss_type, training.cpo_alpha, training.beta) == ("simpo", 0.0, 0.1)
    assert (training.output_dir, model.model_name_or_path) == (str(tmp_path / "trial"), str(ASSETS))
    assert (file.plan.method, file.plan.chunk_steps, file.plan.max_at_once) == ("cpo", None, 8)


@pytest.mark.parametrize(
    ("given", "between", "steps", "size"),
    [(None, 1, 80, 10), (None, 1, 7, 1), (None, 30, 80, 30), (None, 3, 80, 12), (4, 3, 80, 4)],
)
def test_a_chunk_is_an_eighth_up_to_an_evaluation(given: int | None, between: int, steps: int, size: int) -> None:
    assert chunk_size(given, between, steps) == size


# -- mistakes ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no run": ({"run": ...}, ["run: name the run file that is varied"]),
    "no folder": ({"output_dir": ..., "trials": [{"beta": 1}]}, ["output_dir: name the folder of the sweep"]),
    "nothing varied": ({}, ["give either `parameters`"]),
    "both": ({"trials": [{"beta": 1}], "parameters": {"beta": [1]}}, ["give either `parameters`"]),
    "unknown keys": (
        {"trials": [{"beat": 1}], "chunk_step": 3, "beta": 1},
        [
            r"sweep.yaml:1: unknown key 'beta'; it is an option of the run: put it under `run`",
            r"sweep.yaml:\d+: unknown key 'chunk_step'; did you mean 'chunk_steps'?",
            r"sweep.yaml:\d+: trials: unknown option 'beat'; did you mean 'beta'?",
        ],
    ),
    "wrong keys of the run": ({"run": {**RUN, "bta": 1}, "trials": [{"seed": 1}]}, ["unknown key 'bta'; did you mean"]),
    "another method": ({"run": {"method": "ppo"}, "trials": [{"seed": 1}]}, ["method='ppo': must be one of dpo"]),
    "chunks": ({"trials": [{"beta": 1}], "chunk_steps": 0}, ["chunk_steps: must be a whole number above 0, got 0"]),
    "too many": ({"parameters": {"seed": [1, 2, 3]}, "max_trials": 2}, ["more than max_trials=2"]),
    "several processes": (
        {"run": {**RUN, "num_processes": 2, "push_to_hub": True}, "trials": [{"beta": 1}]},
        ["num_processes=2: a sweep trains in one process", "push_to_hub=True: each pause"],
    ),
    "values": (
        {"trials": [{"beta": -1}, {"seed": 1}, {"loss_type": "simpo"}, {"tf32": True}, {"max_steps": "many"}]},
        ["01-beta-1: .*beta", "03-loss_typesimpo: .*loss_type", "04-tf32True: tf32: acts on", "05-max_stepsmany: "],
    ),
    "a rank": ({"trials": [{"use_peft": True, "lora_r": 0}]}, ["01-.*: lora_r=0: an adapter's rank must be above 0"]),
    "secrets of trials": (
        {"trials": [{"hub_token": "hf_abcdefghijkl"}, {"hub_token": "hf_abcdefghijkm"}]},
        ["hub_token: is a secret, .*; put it in `run`"],
    ),
    "a secret among values": ({"parameters": {"hub_token": {"values": ["hf_abcdefghijkl"]}}}, ["is a secret, and"]),
    "a secret of a grid": ({"parameters": {"hub_token": ["hf_abcdefghijkl", "other"]}}, ["hub_token: is a secret, "]),
    "no model": (
        {"run": {"dataset_name": "d"}, "trials": [{"beta": 1}]},
        ["model_name_or_path: name"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_all_mistakes_come_at_once_and_nothing_begins(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, patterns = WRONG[case]
    assert main(["sweep", sweep_file(tmp_path, **keys)]) == 2
    message = capsys.readouterr().err
    for pattern in patterns:
        assert re.search(pattern.replace("?", r"\?").replace("(", r"\("), message), message
    assert "(set in" not in message, "each mistake is one line"
    assert "hf_abcdefghijk" not in message
    assert not (tmp_path / "sweep").exists()


def test_more_than_one_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", sweep_file(tmp_path, trials=[{"beta": 1}])]) == 2
    assert "one process on one device" in capsys.readouterr().err


# -- going on ----------------------------------------------------------------------------------------------------------


def test_trials_that_have_begun_keep_their_options(tmp_path: Path) -> None:
    trials = [{"beta": 0.1}, {"beta": 0.5}]
    path = sweep_file(tmp_path, trials=trials)
    file = read_sweep_file(path)
    sweep = begun(file)
    file.plan.folder.mkdir()
    write_sweep(file.plan.folder, sweep)
    file.write_down(sweep.trials[0], file.plan.folder / "trials" / "01-beta0.1")
    changed = {**RUN, "learning_rate": 1e-3, "logging_steps": 7}
    with pytest.raises(ValueError, match=r"01-beta0.1: learning_rate was None and is 0.001\nput them back") as raised:
        begun(read_sweep_file(sweep_file(tmp_path, run=changed, trials=trials)))
    assert "logging_steps" not in str(raised.value), "which decides no number"
    assert "02-" not in str(raised.value), "which has not begun"
    more = begun(read_sweep_file(sweep_file(tmp_path, trials=[*trials, {"beta": 0.9}])))
    assert [trial.name for trial in more.trials] == ["01-beta0.1", "02-beta0.5", "03-beta0.9"]


def test_values_that_are_added_train_no_configuration_again(tmp_path: Path) -> None:
    betas = {"beta": [0.1, 0.5], "seed": [1, 2]}
    sweep = begun(read_sweep_file(sweep_file(tmp_path, parameters=betas)))
    clone = Trial("05-beta0.9-from01", {"beta": 0.9, "seed": 1}, cloned_from=sweep.trials[0].name)
    (tmp_path / "sweep").mkdir()
    write_sweep(tmp_path / "sweep", sweep.with_trial(clone))
    more = begun(read_sweep_file(sweep_file(tmp_path, parameters={"beta": [0.1, 0.9, 0.5], "seed": [1, 2]})))
    assert more.trials[:5] == (*sweep.trials, clone)
    assert [trial.name for trial in more.trials[5:]] == ["06-beta0.9-seed1", "07-beta0.9-seed2"]
    twice = [{"beta": 0.1, "seed": 1}, {"seed": 1, "beta": 0.1}]
    again = begun(read_sweep_file(sweep_file(tmp_path, trials=twice)))
    assert [trial.name for trial in again.trials[5:]] == ["06-beta0.1-seed1"], "one of the two is there"


def test_a_sweep_goes_on_by_the_metric_that_its_file_names(tmp_path: Path) -> None:
    run = {**RUN, "eval_strategy": "steps", "eval_steps": 5}
    sweep = begun(read_sweep_file(sweep_file(tmp_path, run=run, trials=[{"beta": 0.1}])))
    write_rows(tmp_path / "sweep", "01-beta0.1", [{"step": 5, "eval_loss": 0.4}, {"step": 10, "eval_loss": 0.6}])
    write_sweep(tmp_path / "sweep", sweep)
    (trial,) = begun(read_sweep_file(sweep_file(tmp_path, run=run, trials=[{"beta": 0.1}], metric="eval_loss"))).trials
    assert (trial.last, trial.best) == (0.6, 0.4)
    keys = {"metric": "eval_loss", "direction": "maximize"}
    sweep = begun(read_sweep_file(sweep_file(tmp_path, run=run, trials=[{"beta": 0.1}], **keys)))
    assert (sweep.metric, sweep.direction, sweep.trials[0].best) == ("eval_loss", "maximize", 0.6)


def test_a_command_that_is_given_while_a_sweep_starts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep_file(tmp_path, trials=[{"beta": 0.1}])
    file = read_sweep_file(path)
    sweep = begun(file)
    file.plan.folder.mkdir()
    write_sweep(file.plan.folder, sweep)
    planned, started = command.planned, []

    def slowly(file: SweepFile) -> list[Trial]:
        found = planned(file)
        assert main(["sweep", "stop", str(file.plan.folder), "01-beta0.1"]) == 0
        return found

    def train(file: SweepFile, sweep: Sweep, engine: str) -> Sweep:
        started.append(sweep)
        return sweep

    monkeypatch.setattr(command, "planned", slowly)
    monkeypatch.setattr(command, "train", train)
    assert main(["sweep", path]) == 0
    assert started[0].trials[0].status is Status.STOPPED


def test_a_trial_is_called_by_its_name_in_trackers(tmp_path: Path) -> None:
    for run, name in ((RUN, "01-beta0.1"), ({**RUN, "run_name": "mine"}, "mine")):
        file = read_sweep_file(sweep_file(tmp_path, run=run, trials=[{"beta": 0.1}]))
        assert file.configs({"beta": 0.1}, tmp_path / "01-beta0.1")[1].run_name == name


def test_a_metric_may_be_of_a_set_with_a_name(tmp_path: Path) -> None:
    keys = {"trials": [{"beta": 0.1}], "metric": "eval_hard_rewards/margins"}
    assert read_sweep_file(sweep_file(tmp_path, **keys)).strategy.metric == "eval_hard_rewards/margins"


def test_secrets_are_in_no_file(tmp_path: Path) -> None:
    token = "hf_abcdefghijklmnop"
    path = sweep_file(tmp_path, run={**RUN, "hub_token": token}, trials=[{"beta": 0.1}])
    file = read_sweep_file(path)
    sweep = begun(file)
    folder = file.plan.folder
    folder.mkdir()
    write_sweep(folder, sweep)
    file.write_down(sweep.trials[0], folder / "trials" / "01-beta0.1")
    texts = [found.read_text() for found in folder.rglob("*") if found.is_file()]
    assert len(texts) == 2
    assert not [text for text in texts if token in text]
    assert file.configs({}, folder)[1].hub_token == token, "which the run itself has"


def test_a_state_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "trials": [{"name": "a"}]}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match=r"sweep.json: is no state of a sweep"):
            read_sweep(tmp_path)
