"""A sweep on several machines or devices: each trial is one of Ray Tune's, and the files are the same.

Ray Tune places the trials, several at a time. In each of its workers a trial takes its turns one after another, as it
does in one process (`prefopt.sweep.scheduler`), and after each of them it reports how it stands. The process that was
started writes ``sweep.json``, shows the table, answers commands, prunes and searches, by the same rules. What Ray
writes about its own state is not used, and deleted: a sweep goes on from its own.
"""

# pyright: reportMissingImports=false
# Ray is an extra, which is not installed where types are checked.

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep, as it does without Ray
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths of run files stay what they are
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from prefopt.files import remove_tree
from prefopt.sweep.chunks import Shared
from prefopt.sweep.commands import pending
from prefopt.sweep.scheduler import Board, Hooks, MakeRun, as_on_the_disk, take_turn
from prefopt.sweep.state import OVER, Status, Sweep, Trial

__all__ = ["run_on_ray"]

RAYS_OWN = ".ray"
"""In the folder of a sweep while it runs."""
ADDRESS = "RAY_ADDRESS"
"""Environment variable: a cluster that runs already; without it Ray is started on this machine."""


def run_on_ray(
    folder: Path, sweep: Sweep, make: MakeRun, hooks: Hooks, max_at_once: int, environment: Mapping[str, str]
) -> Sweep:
    """Train until every trial is over; goes on where an earlier start was interrupted or killed.

    Args:
        folder: of the sweep, held by this process, and at this path on all machines.
        sweep: as it stands.
        make: a trial as plain objects; it is sent to the workers.
        hooks: what else has a say, in this process.
        max_at_once: trials that are trained at the same time, as far as there are processors or devices.
        environment: variables of the workers.

    Returns:
        How the sweep stands at its end.
    """
    board = Board(folder, sweep, hooks)
    put_back(board)
    start_ray(environment)
    try:
        needed = {"cpu": 1, "gpu": 1 if ray.cluster_resources().get("GPU") else 0}
        work = tune.with_parameters(train_trial, make=make, folder=folder.absolute(), sweep=replace(sweep, trials=()))
        tune.Tuner(
            tune.with_resources(work, needed),
            tune_config=tune.TuneConfig(
                search_alg=Turns(board),
                scheduler=Rules(board),
                num_samples=-1,  # until `Turns` has no more
                max_concurrent_trials=max_at_once,
            ),
            run_config=tune.RunConfig(name="trials", storage_path=str((folder / RAYS_OWN).absolute()), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
        remove_tree(folder / RAYS_OWN)
        put_back(board)
    return board.sweep


def start_ray(environment: Mapping[str, str]) -> None:
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    workers = {"env_vars": dict(environment)}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get(ADDRESS):
        ray.init(runtime_env=workers, **quiet)
    else:
        ray.init(runtime_env=workers, include_dashboard=False, **quiet)


def put_back(board: Board) -> None:
    """Trials that nobody trains any more go on from their newest checkpoints."""
    for trial in board.sweep.trials:
        if trial.status is Status.RUNNING:
            board.put(as_on_the_disk(board.folder, trial), "found")


# -- in a worker -------------------------------------------------------------------------------------------------------


class WorkersBoard(Board):
    """One trial as its worker sees it; files of the sweep are written elsewhere."""

    def write(self, sweep: Sweep, name: str | None = None) -> None:
        self.sweep = sweep

    def answer_requests(self, busy: str | None = None) -> bool:
        return any(request.trial == busy for request in pending(self.folder))


def train_trial(config: dict[str, Any], make: MakeRun, folder: Path, sweep: Sweep) -> None:
    """Train a trial chunk by chunk, and report it after each of them; Ray ends it there where it is given up."""
    os.chdir(config["here"])
    trial = as_trial(config["trial"])
    board, shared = WorkersBoard(folder, sweep.with_trial(trial), Hooks()), Shared()
    while trial.status not in OVER:
        take_turn(board, trial, make, shared)
        trial = board.sweep.trial(trial.name)
        tune.report({"trial": json.dumps(asdict(trial))})


def as_trial(values: Mapping[str, Any]) -> Trial:
    return Trial(**{**values, "status": Status(values["status"])})


# -- in the process that was started -----------------------------------------------------------------------------------


class Turns(Searcher):
    """Gives Ray the trials that wait, and what the search proposes."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board, self.names = board, dict[str, str]()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See ``ray.tune.search.Searcher``."""
        self.board.answer_requests()
        busy = set(self.names.values())
        ready = [trial for trial in self.board.sweep.trials if trial.status in (Status.WAITING, Status.PAUSED)]
        trial = next((trial for trial in ready if trial.name not in busy), None)
        trial = trial or self.board.hooks.suggest(self.board.sweep)
        if trial is None:
            return None if busy else Searcher.FINISHED
        self.names[trial_id] = trial.name
        self.board.put(replace(trial, status=Status.RUNNING), "chunk", step=trial.steps)
        return {"trial": asdict(replace(trial, status=Status.WAITING)), "here": str(Path.cwd())}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """See ``ray.tune.search.Searcher``."""
        self.names.pop(trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: ``sweep.json`` has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from ``sweep.json``."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Ray's own record


class Rules(FIFOScheduler):
    """Takes in what workers report, and says who goes on."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board = board

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See ``ray.tune.schedulers.TrialScheduler``."""
        board, reported = self.board, as_trial(json.loads(result["trial"]))
        now = board.sweep.trial(reported.name)
        event = str(reported.status)
        if now.status in OVER and reported.status is Status.PAUSED:  # it was stopped or pruned meanwhile
            reported = replace(reported, status=now.status, reason=now.reason)
        elif reported.status is Status.PAUSED:
            reported = replace(reported, status=Status.RUNNING)
        first = board.seconds() if now.first_seen is None and reported.last is not None else now.first_seen
        board.put(replace(reported, spared=now.spared, first_seen=first), event)
        board.answer_requests()
        for name, why in board.hooks.prune(board.sweep).items():
            board.put(replace(board.sweep.trial(name), status=Status.PRUNED, reason=why), "pruned", reason=why)
        is_over = board.sweep.trial(reported.name).status in OVER
        return TrialScheduler.STOP if is_over else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """See ``ray.tune.schedulers.TrialScheduler``."""
        super().on_trial_error(tune_controller, trial)
        name, why = trial.config["trial"]["name"], "its worker died"
        with suppress(OSError, TypeError):
            why = f"{why}: {Path(trial.error_file).read_text(encoding='utf-8')[-1000:]}"
        self.board.put(replace(self.board.sweep.trial(name), status=Status.FAILED, reason=why), "failed", reason=why)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Ray's own record
