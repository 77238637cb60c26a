"""``prefopt sweep``: many configurations over one data set at the same time, and commands to a sweep that runs."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import UserError, users_mistakes
from prefopt.cli.own_parser import OwnParser
from prefopt.cli.sweep_commands import COMMANDS, command
from prefopt.terminal import harmless

if TYPE_CHECKING:
    from prefopt.cli.sweep_file import SweepFile
    from prefopt.sweep.state import Sweep, Trial

__all__ = ["main"]

LOG = "sweep.log"
"""In the folder of a sweep: what the package said of its trials."""
USAGE = """\
usage: prefopt sweep SWEEP.yaml [--output_dir DIR] [--engine ray]
                                                        train all trials; the same command goes on after a stop
       prefopt sweep ls DIR                             how they stand
       prefopt sweep stop DIR TRIAL                     while it runs, from another terminal
       prefopt sweep resume DIR TRIAL                   a trial that was stopped, pruned, or has failed
       prefopt sweep clone DIR TRIAL --set beta=0.2 [learning_rate=1e-5 ...] [--from_scratch]

Many configurations over one data set. They take turns on one base model in one process, so that all curves come early,
and each gives the very result that it gives when it is trained alone.

SWEEP.yaml
  run: base.yaml                the run that is varied, or its options themselves
  output_dir: runs/sweep        sweep.json, report.html, and trials/NAME/ with a run each
  parameters:                   every combination is a trial, or what a search may try
    beta: [0.05, 0.1, 0.5]
    learning_rate: {low: 1e-6, high: 1e-4, log: true}
  trials: [{beta: 0.1, lora_r: 8}, {beta: 0.5, lora_r: 32}]     in place of parameters: one by one
  chunk_steps: 50               optimizer steps of a turn; default: an eighth of a trial's run
  max_at_once: 8                trials that take turns; the others wait
  max_trials: 100               more of them are refused
  search: tpe                   grid, random, tpe, with num_trials: 20
  pruning: asha                 hyperband, median, none
  metric: eval_rewards/accuracies       with direction: maximize

Status 0: all finished; 1: a trial has failed; 2: a mistake; 130: stopped by Ctrl-C.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs ``prefopt sweep``; returns the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if arguments[0] in COMMANDS:
        return command(arguments)
    parser = OwnParser(prog="prefopt sweep")
    parser.add_argument("file")
    parser.add_argument("--output_dir")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options = parser.parse_args(list(arguments))
    return start(options.file, options.output_dir, options.engine)


# -- a sweep -----------------------------------------------------------------------------------------------------------


def start(path: str, output_dir: str | None, engine: str) -> int:
    """Begin a sweep, or go on with it."""
    with users_mistakes():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a sweep trains in one process on one device; start it without a launcher")
        from prefopt.cli.sweep_file import read_sweep_file

        file = read_sweep_file(path, output_dir)
        trials = planned(file)
    from prefopt.sweep.state import FolderInUseError, held

    try:
        with held(file.plan.folder):
            with users_mistakes():
                sweep = begun(file, trials)
            sweep = train(file, sweep, engine)
    except FolderInUseError as error:
        raise UserError(str(error)) from error
    except (KeyboardInterrupt, SystemExit) as stopped:  # in a trial's run, which names the signal, or between two
        return 128 + int(getattr(stopped, "signal", signal.SIGINT))
    return int(any(trial.status == "failed" for trial in sweep.trials))


def planned(file: SweepFile) -> list[Trial]:
    """The trials that a file lists, or that make up its grid; none of a search.

    Raises:
        ValueError: with every mistake of every trial.
    """
    from prefopt.sweep.plan import explicit_trials
    from prefopt.sweep.space import corners
    from prefopt.sweep.strategy import whole_grid

    plan, strategy = file.plan, file.strategy
    combinations = list(plan.trials) or (whole_grid(strategy, plan.max_trials) if strategy.is_grid else [])
    if len(combinations) > plan.max_trials:
        raise ValueError(
            f"{file.path}: trials: these are {len(combinations)}, more than max_trials={plan.max_trials}: raise it"
        )
    trials = explicit_trials(combinations, file.check)
    if not plan.trials and not strategy.is_grid:  # of a search, what bounds it is checked
        explicit_trials(corners(strategy.parameters), file.check)
    return trials


def begun(file: SweepFile, trials: Sequence[Trial]) -> Sweep:
    """How the sweep of a file stands: anew, or as an earlier start has left it, with trials that were added since, and
    by the metric that the file now names.

    Args:
        file: of the sweep, whose folder is held: a command may have changed what lies there until then.
        trials: as `planned`.

    Raises:
        ValueError: the file has changed under trials that have begun.
    """
    from prefopt.sweep.plan import new_trials
    from prefopt.sweep.state import Sweep, now, read_sweep
    from prefopt.sweep.summary import with_values

    plan, strategy = file.plan, file.strategy
    sweep = read_sweep(plan.folder)
    if sweep is None:
        new = Sweep(str(file.path.resolve()), plan.method, strategy.metric, strategy.direction, started=now())
        return replace(new, chunk_steps=plan.chunk_steps, trials=tuple(trials))
    if changed := file.changed(sweep.trials):
        raise ValueError("\n".join([f"{plan.folder} has trials that began with other options:", *changed, PUT_BACK]))
    added = new_trials(trials, sweep.trials)
    sweep = replace(sweep, chunk_steps=plan.chunk_steps, metric=strategy.metric, direction=strategy.direction)
    return replace(sweep, trials=(*(with_values(plan.folder, sweep, trial) for trial in sweep.trials), *added))


PUT_BACK = "put them back, or name another output_dir; prefopt sweep clone goes on with changed options"


def train(file: SweepFile, sweep: Sweep, engine: str) -> Sweep:
    """Train all trials, shown while they run.

    Raises:
        UserError: model or data of the first trial are not there, or the disk is full.
        KeyboardInterrupt, SystemExit: a signal was received, and how to go on was said.
    """
    from prefopt.sweep.chunks import Shared, load_shared
    from prefopt.sweep.overview import Overview
    from prefopt.sweep.scheduler import ENDS_THE_SWEEP, Hooks, run_sweep
    from prefopt.sweep.state import OVER
    from prefopt.sweep.strategy import given_up
    from prefopt.sweep.table import display

    folder, shared, page = file.plan.folder, Shared(), Overview(file.plan.folder)
    with logged(folder), display(folder) as shown:

        def watch(now: Sweep, name: str | None) -> None:
            shown.update(now, name)
            page.update(now)

        hooks = Hooks(watch, lambda now: given_up(file.strategy, folder, now), suggestion(file), file.check)
        try:
            with users_mistakes():
                for trial in [trial for trial in sweep.trials if trial.status not in OVER][:1]:
                    load_shared(file.run(trial), shared)
            if engine == "ray":
                sweep = on_ray(file, sweep, hooks)
            else:
                sweep = run_sweep(folder, sweep, file.run, hooks, file.plan.max_at_once, shared)
        except ENDS_THE_SWEEP as error:
            raise UserError(str(error)) from error
        except (KeyboardInterrupt, SystemExit):
            shown.console.print(harmless(f"stopped; to go on: prefopt sweep {file.path}"), markup=False, soft_wrap=True)
            raise
        page.update(sweep, is_over=True)
    return sweep


def on_ray(file: SweepFile, sweep: Sweep, hooks: Any) -> Sweep:
    """Train all trials through Ray Tune.

    Raises:
        UserError: it is not installed.
    """
    try:
        from prefopt.sweep.ray_engine import run_on_ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: there is no {error.name}: pip install 'prefopt[ray]'") from error
    return run_on_ray(file.plan.folder, sweep, file.run, hooks, file.plan.max_at_once, file.base.env)


def suggestion(file: SweepFile) -> Any:
    """What the scheduler asks for the next trial of a search."""
    from prefopt.sweep.plan import trial_name
    from prefopt.sweep.state import Trial
    from prefopt.sweep.strategy import next_options

    def suggest(sweep: Sweep) -> Trial | None:
        if file.plan.trials or file.strategy.is_grid or len(sweep.trials) >= file.plan.max_trials:
            return None
        options = next_options(file.strategy, file.plan.folder, sweep)
        name = None if options is None else trial_name(len(sweep.trials) + 1, options)
        return None if options is None else Trial(str(name), options)

    return suggest


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """What the package says goes to a file within; a warning is shown too, once."""
    from prefopt.cli.train import HarmlessFormatter

    folder.mkdir(parents=True, exist_ok=True)
    package, seen = logging.getLogger("prefopt"), set()
    level, propagate = package.level, package.propagate
    to_file, to_terminal = logging.FileHandler(folder / LOG), logging.StreamHandler()
    to_file.setFormatter(HarmlessFormatter("%(asctime)s %(message)s"))
    to_terminal.setFormatter(HarmlessFormatter("%(message)s"))
    to_terminal.setLevel(logging.WARNING)
    to_terminal.addFilter(lambda record: record.getMessage() not in seen and not seen.add(record.getMessage()))
    package.setLevel(logging.INFO)
    package.propagate = False
    for handler in (to_file, to_terminal):
        package.addHandler(handler)
    try:
        yield
    finally:
        for handler in (to_file, to_terminal):
            package.removeHandler(handler)
            handler.close()
        package.level, package.propagate = level, propagate
