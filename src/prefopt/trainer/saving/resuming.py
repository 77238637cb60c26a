"""Which checkpoint a run goes on from: all ranks decide alike, on every node by its own copy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from prefopt.checkpoints.folder import checkpoints_in, final_folder, origin
from prefopt.checkpoints.manifest import faults
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.saving.continuation import ResumeError, foreign_checkpoint

__all__ = ["STATE_FILE", "chosen_checkpoint", "from_main", "raise_together"]

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
WORDS = {"true": True, "false": False}
"""What a command line makes of a yes or no."""
SHOWN_FAULTS = 3


def chosen_checkpoint(args: PreferenceConfig, given: Any, run: Path) -> str | None:
    """The folder of a checkpoint to go on from, found good; None to begin.

    Args:
        args: of the run.
        given: what the user asked for: None, a bool, or a folder, as a path or as a name in ``run``.
        run: the folder where this run's checkpoints lie.

    Raises:
        ResumeError: what was asked for is damaged, or not there; with the files and what is wrong with them.
    """
    wanted = None if given is None else WORDS.get(str(given).lower(), given)
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return newest(args, run, may_begin=True)
    folder = Path(from_main(str(existing(Path(wanted), run))))
    if from_main(bool(checkpoints_in(folder))):
        return newest(args, folder, may_begin=False)
    found = faults_anywhere(args, folder)
    if found and not from_main(foreign_checkpoint(folder)):
        raise ResumeError(
            f"resume_from_checkpoint={str(given)!r}: {folder} cannot be gone on from: {listed(found)}. "
            "`resume_from_checkpoint=True` takes the newest good one of the run."
        )
    return str(folder)


def existing(path: Path, run: Path) -> Path:
    """``path``, or a folder of that name in ``run``, such as the `last-checkpoint` that was fetched from the Hub."""
    return path if path.is_dir() or not (run / path).is_dir() else run / path


def newest(args: PreferenceConfig, run: Path, *, may_begin: bool) -> str | None:
    """The good checkpoint in ``run`` that was written last; those that are passed over are named.

    Of several runs in one folder it is one of that which has written last. A checkpoint of another library counts
    where there is none of prefopt's own.

    Raises:
        ResumeError: there are checkpoints, and none is good; or none, and the run may not begin.
    """
    passed: dict[Path, list[str]] = {}
    for step in steps_to_try(gather_object(origins(run) if args.should_save else [])):
        folder = final_folder(run, step)
        if not (found := faults_anywhere(args, folder)):
            say(args, passed)
            return str(folder)
        passed[folder] = found
    if passed and all(from_main([foreign_checkpoint(folder) for folder in passed])):
        return str(next(iter(passed)))
    if passed:
        lines = "\n".join(f"  {folder}: {listed(found)}" for folder, found in passed.items())
        raise ResumeError(
            f"{run} has no good checkpoint to go on from:\n{lines}\nRestore one of them, or begin again with another "
            "`output_dir`, or with these moved away."
        )
    if not may_begin:
        raise ResumeError(f"{run} has no checkpoint.")
    if args.process_index == 0:
        logger.info("%s has no checkpoint yet: the run begins.", run)
    return None


def origins(run: Path) -> list[tuple[int, tuple[int, str] | None]]:
    """Of each checkpoint its step and its `origin`."""
    return [(step, origin(folder)) for step, folder in checkpoints_in(run).items()]


def steps_to_try(found: list[tuple[int, tuple[int, str] | None]]) -> list[int]:
    """Steps of the run that has written last, its last checkpoint first.

    Before them those of which no manifest says whose they are: they are damaged, and are to be named.
    """
    known = {step: came for step, came in sorted(found, key=lambda item: item[1] or ()) if came is not None}
    unknown = sorted({step for step, _ in found} - known.keys(), reverse=True)
    last = max(known.values(), default=(0, ""))[1]
    latest = sorted(known.items(), key=lambda item: item[1], reverse=True)
    return unknown + [step for step, came in latest if came[1] == last]


def say(args: PreferenceConfig, passed: dict[Path, list[str]]) -> None:
    if args.process_index == 0:
        for folder, found in passed.items():
            if foreign_checkpoint(folder):
                continue
            logger.warning("%s is damaged and passed over: %s.", folder, listed(found))


def listed(found: list[str]) -> str:
    """The first faults of a checkpoint, and how many more there are."""
    more = f" and {len(found) - SHOWN_FAULTS} more" if len(found) > SHOWN_FAULTS else ""
    return f"{'; '.join(found[:SHOWN_FAULTS])}{more}"


# -- ranks -------------------------------------------------------------------------------------------------------


def faults_anywhere(args: PreferenceConfig, folder: Path) -> list[str]:
    """What is wrong with a checkpoint on any node that has its own copy; the same on every rank."""
    return list(dict.fromkeys(gather_object(faults(folder) if args.should_save else [])))


def from_main(value: Any) -> Any:
    """The main process's value, on every rank."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def raise_together(problem: str | None, kind: type[Exception]) -> None:
    """Raise what any rank has found, on all of them: none is left waiting for the others."""
    if problems := gather_object([problem] if problem else []):
        raise kind(problems[0])
