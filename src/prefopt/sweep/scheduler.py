"""Trials take turns: in each round, every trial that has begun trains a chunk, so that all curves come early."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt import files
from prefopt.checkpoints.folder import FolderInUseError, checkpoints_in, final_folder
from prefopt.sweep.chunks import AtStep, Chunk, Run, Shared, free, train_chunk
from prefopt.sweep.commands import Check, answer, apply, newest_checkpoint, pending
from prefopt.sweep.state import BEGUN, Status, Sweep, Trial, note_event, trial_folder, write_sweep
from prefopt.sweep.summary import with_values
from prefopt.trainer.ending.record import reason
from prefopt.trainer.saving.checkpointing import CheckpointNotWrittenError

__all__ = ["Board", "Hooks", "run_sweep"]

logger = logging.getLogger(__name__)

TURNS = 8
"""Chunks of a run, where their length is not given."""
ENDS_THE_SWEEP = (CheckpointNotWrittenError, FolderInUseError)
"""Errors that the next trial would meet as well."""
MakeRun = Callable[[Trial], Run]


def _nothing(sweep: Sweep, name: str | None) -> None: ...


def _none(sweep: Sweep) -> Mapping[str, str]:
    return {}


def _no_more(sweep: Sweep) -> Trial | None:
    return None


@dataclass(frozen=True)
class Hooks:
    """What else has a say in a sweep.

    Args:
        watch: told of every change, and of the trial that has changed.
        prune: after a round, the trials to be given up, and why.
        suggest: the next trial; None: there is none, or none yet.
        check: what is wrong with the run of a trial's options, for clones.
    """

    watch: Callable[[Sweep, str | None], None] = _nothing
    prune: Callable[[Sweep], Mapping[str, str]] = _none
    suggest: Callable[[Sweep], Trial | None] = _no_more
    check: Check = lambda options: []


class Board:
    """How the sweep stands, in memory and on the disk alike.

    Args:
        folder: of the sweep.
        sweep: as it stands.
        hooks: of which ``watch`` is told.
    """

    def __init__(self, folder: Path, sweep: Sweep, hooks: Hooks) -> None:
        self.folder, self.sweep, self.hooks = folder, sweep, hooks
        self.begun = time.monotonic() - sweep.seconds

    def seconds(self) -> float:
        """The sweep's own time, that of its earlier starts included."""
        return round(time.monotonic() - self.begun, 3)

    def show(self, trial: Trial) -> None:
        """A trial as it is now, for who watches; nothing is written."""
        self.sweep = self.sweep.with_trial(trial)
        self.hooks.watch(self.sweep, trial.name)

    def put(self, trial: Trial, event: str = "", **values: Any) -> None:
        """A trial as it is from now on, and what happened."""
        self.write(self.sweep.with_trial(trial), trial.name)
        if event:
            note_event(self.folder, event, trial.name, **values)

    def write(self, sweep: Sweep, name: str | None = None) -> None:
        """The sweep as it is from now on."""
        self.sweep = replace(sweep, seconds=self.seconds())
        write_sweep(self.folder, self.sweep)
        self.hooks.watch(self.sweep, name)

    def answer_requests(self, busy: str | None = None) -> bool:
        """Do what was asked; what has to wait until no trial is ``busy`` is said by True: what concerns that trial, and
        clones, whose check makes a config, which resets what accelerate knows of the process in the middle of a run."""
        waits = False
        for request in pending(self.folder):
            if busy is not None and (request.trial == busy or request.command == "clone"):
                waits = True
                continue
            try:
                sweep, text = apply(self.folder, self.sweep, request, self.hooks.check)
            except (ValueError, OSError) as error:
                answer(self.folder, request, str(error), is_done=False)
                continue
            self.write(sweep, sweep.trials[-1].name if request.command == "clone" else request.trial)
            answer(self.folder, request, text, is_done=True)
        return waits


def run_sweep(
    folder: Path, sweep: Sweep, make: MakeRun, hooks: Hooks, max_at_once: int, shared: Shared | None = None
) -> Sweep:
    """Train until every trial is over; goes on where an earlier start was interrupted or killed.

    Args:
        folder: of the sweep, held by this process.
        sweep: as it stands.
        make: a trial as plain objects.
        hooks: what else has a say.
        max_at_once: trials that take turns; the others wait until one of these is over.
        shared: what has been loaded already.

    Returns:
        How the sweep stands at its end.

    Raises:
        KeyboardInterrupt, SystemExit: a signal was received; every trial can go on.
    """
    board, shared = Board(folder, sweep, hooks), shared or Shared()
    for trial in sweep.trials:
        if trial.status is Status.RUNNING:  # it was killed
            board.put(as_on_the_disk(folder, trial), "found")
    with cheap_collections():
        while True:
            board.answer_requests()
            trial = next_trial(board.sweep, max_at_once)
            if trial is not None:
                take_turn(board, trial, make, shared)
            elif not next_round(board, max_at_once):
                return board.sweep


@contextmanager
def cheap_collections() -> Iterator[None]:
    """What is there before a sweep is left out when the garbage of a chunk is looked for: modules by the thousand."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def as_on_the_disk(folder: Path, trial: Trial) -> Trial:
    """A trial whose process died in a chunk: it goes on from its newest checkpoint, in the same round."""
    step = newest_checkpoint(trial_folder(folder, trial.name)) or 0
    return replace(trial, status=Status.PAUSED if step else Status.WAITING, steps=step, turn=trial.turn - 1)


def next_trial(sweep: Sweep, max_at_once: int) -> Trial | None:
    """Whose turn it is in this round; None where all have had theirs."""
    begun = [trial for trial in sweep.trials if trial.status in BEGUN]
    waiting = [trial for trial in sweep.trials if trial.status is Status.WAITING]
    ready = [*begun, *waiting[: max(0, max_at_once - len(begun))]]
    due = [trial for trial in sweep.trials if trial in ready and trial.turn < sweep.turn]
    return due[0] if due else None


def next_round(board: Board, max_at_once: int) -> bool:
    """Give up trials, take in new ones, begin another round; False where nothing is left to do."""
    for name, why in board.hooks.prune(board.sweep).items():
        board.put(replace(board.sweep.trial(name), status=Status.PRUNED, reason=why), "pruned", reason=why)
    while num_open(board.sweep) < max_at_once and (trial := board.hooks.suggest(board.sweep)) is not None:
        board.put(trial, "added", options=trial.options)
    if not num_open(board.sweep):
        return False
    board.write(replace(board.sweep, turn=board.sweep.turn + 1))
    return True


def num_open(sweep: Sweep) -> int:
    return sum(trial.status in BEGUN or trial.status is Status.WAITING for trial in sweep.trials)


def take_turn(board: Board, trial: Trial, make: MakeRun, shared: Shared) -> None:
    """One chunk of a trial, and what came of it. An error is the trial's own end, and the others go on."""
    start = time.monotonic()
    resume, changes = trial.steps > 0, 0 < trial.steps == trial.clone_step
    logger.info("%s: from step %d on", trial.name, trial.steps)
    board.put(replace(trial, status=Status.RUNNING, turn=board.sweep.turn), "chunk", step=trial.steps)
    try:
        run = make(trial)
        run.args.allow_changes = changes  # the first chunk of a clone goes on from another trial's checkpoint
        size = functools.partial(chunk_size, board.sweep.chunk_steps, evaluation_steps(run.args))
        chunk = train_chunk(run, shared, at_each_step(board, trial, size), resume=resume)
    except ENDS_THE_SWEEP:
        board.put(as_on_the_disk(board.folder, board.sweep.trial(trial.name)), "left")
        raise
    except Exception as error:
        why = reason(error)
        text = f"{why['type']}: {why['message']}"
        logger.warning("%s failed after step %d: %s", trial.name, board.sweep.trial(trial.name).steps, text)
        board.put(replace(spent(board, trial, start), status=Status.FAILED, reason=text), "failed", reason=text)
    except BaseException:
        board.put(as_on_the_disk(board.folder, spent(board, trial, start)), "left")
        raise
    else:
        board.put(after(board, spent(board, trial, start), chunk), "finished" if chunk.is_over else "paused")
    finally:
        free()


def spent(board: Board, trial: Trial, start: float) -> Trial:
    """The trial as its chunk has left it, with the seconds since ``start``."""
    seconds = trial.seconds + time.monotonic() - start
    return replace(with_values(board.folder, board.sweep, board.sweep.trial(trial.name)), seconds=round(seconds, 3))


def after(board: Board, trial: Trial, chunk: Chunk) -> Trial:
    """The trial after a chunk; the checkpoint of its last pause goes, as there is a newer one."""
    run, extra = trial_folder(board.folder, trial.name), trial.extra_checkpoint
    if extra is not None and max(checkpoints_in(run), default=0) > extra:
        remove(run, extra)
        extra = None
    status = Status.FINISHED if chunk.is_over else Status.PAUSED
    extra = extra if chunk.extra_checkpoint is None else chunk.extra_checkpoint
    return replace(trial, status=status, steps=chunk.steps, max_steps=chunk.max_steps, extra_checkpoint=extra)


def remove(run: Path, step: int) -> None:
    """Delete a checkpoint, unless a kill has come in between; what is left of it after one is no checkpoint."""
    gone = run / f"_checkpoint-{step}.removed"
    if final_folder(run, step).is_dir():
        files.rename(final_folder(run, step), gone)
    files.remove_tree(gone)


# -- within a chunk ----------------------------------------------------------------------------------------------------


def at_each_step(board: Board, trial: Trial, size: Callable[[int], int]) -> AtStep:
    """What is done between two steps of a trial: whoever watches is told, requests are answered."""

    def is_end(step: int, max_steps: int, rows: list[dict[str, Any]]) -> bool:
        now = replace(board.sweep.trial(trial.name), steps=step, max_steps=max_steps)
        if now.first_seen is None and any(board.sweep.metric in row for row in rows):
            now = replace(now, first_seen=board.seconds())
        board.show(now)
        waits = board.answer_requests(busy=trial.name)
        return waits or step >= (trial.steps // size(max_steps) + 1) * size(max_steps)

    return is_end


def chunk_size(given: int | None, between_evaluations: int, max_steps: int) -> int:
    """Steps of a chunk: as given, or an eighth of the run, up to an evaluation, so that each turn shows a value.

    >>> chunk_size(None, 50, 1000), chunk_size(None, 1, 1000), chunk_size(10, 50, 1000)
    (150, 125, 10)
    """
    if given is not None:
        return given
    return -(-max_steps // (TURNS * between_evaluations)) * between_evaluations


def evaluation_steps(args: Any) -> int:
    """Steps between two evaluations; 1 where steps do not decide."""
    steps = args.eval_steps if args.eval_strategy == "steps" else None
    return int(steps) if steps is not None and steps >= 1 else 1
