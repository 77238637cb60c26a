"""Folders of checkpoints: written beside, put in place by a rename, kept to a limit, put in order after a kill.

Names that begin with ``_`` are taken for a checkpoint by no finder, and pushed to the Hub by no upload.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt import files
from prefopt.checkpoints.manifest import faults, manifest_of, write_manifest
from prefopt.checkpoints.publish import staged_model

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "FolderInUseError",
    "NoLocksError",
    "checkpoints_in",
    "checkpoints_of",
    "final_folder",
    "held",
    "origin",
    "put_in_order",
    "put_in_place",
    "rotate",
    "staging_folder",
]

FINAL = re.compile(r"checkpoint-(\d+)")
BESIDE = re.compile(r"_checkpoint-(\d+)\.(writing|replaced|removed)")
LOCK = "_run.lock"


class FolderInUseError(RuntimeError):
    """Another run writes its checkpoints to the same folder."""


class NoLocksError(RuntimeError):
    """The file system has no locks."""


def final_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; only a whole one ever has this name."""
    return run / f"checkpoint-{step}"


def staging_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return run / f"_checkpoint-{step}.writing"


def aside(final: Path, what: str) -> Path:
    """The name beside ``final`` of a folder that is to go: ``replaced`` or ``removed``."""
    return final.with_name(f"_{final.name}.{what}")


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints of a run, good or not, the newest first."""
    found = {int(match[1]): path for path in folders(run) if (match := FINAL.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def folders(run: Path) -> list[Path]:
    return sorted(path for path in run.iterdir() if path.is_dir()) if run.is_dir() else []


def origin(checkpoint: Path) -> tuple[int, str] | None:
    """When a checkpoint was written, in nanoseconds, and the name of the run it is of; None where no manifest says."""
    try:
        content = manifest_of(checkpoint)
    except (OSError, ValueError):
        return None
    return content.get("written", 0), content.get("run", "")


def checkpoints_of(run: Path, name: str) -> list[Path]:
    """The checkpoints in a folder that are of the run of this name, good or not, the one written last first."""
    found = [(came[0], path) for path in checkpoints_in(run).values() if (came := origin(path)) and came[1] == name]
    return [path for _, path in sorted(found, reverse=True)]


def put_in_place(staging: Path, final: Path, step: int, name: str) -> None:
    """Make all that was written last, vouch for it, and give it its name.

    Where a checkpoint of that name is there already, it is set aside first: `put_in_order` finds at every moment the
    old or the new one.
    """
    files.sync_tree(staging)
    write_manifest(staging, step, name)
    files.sync_folder(staging)
    move_in(staging, final)


def move_in(staging: Path, final: Path) -> None:
    """Rename a whole folder over one that may be there."""
    old = aside(final, "replaced")
    if final.exists():
        files.remove_tree(old)
        files.rename(final, old)
    files.rename(staging, final)
    files.remove_tree(old)


def put_in_order(run: Path) -> None:
    """What a killed run has left: a whole checkpoint gets its name, a part of one is deleted. For the lock's holder."""
    files.remove_tree(staged_model(run))
    matches = [(match, path) for path in folders(run) if (match := BESIDE.fullmatch(path.name))]
    left = [(match[2], path, final_folder(run, int(match[1]))) for match, path in matches]
    for what, path, final in sorted(left, reverse=True):  # `writing`, then `replaced`, then `removed`
        if what == "writing" and not faults(path):
            move_in(path, final)
        elif what == "replaced" and not final.exists():
            files.rename(path, final)
        else:
            files.remove_tree(path)


def rotate(run: Path, name: str, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete those good checkpoints of a run that were written first, until ``limit`` are left.

    Neither counted nor deleted are those of other runs, and damaged ones: such a one takes no place of a good one,
    and may be all there is of its step.

    Args:
        run: the folder they lie in.
        name: the run's.
        limit: how many good ones stay; None or 0 for all.
        keep: these stay whatever their age, the one that was just written among them.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    good = [path for path in checkpoints_of(run, name) if not faults(path, contents=False)]
    others = [path for path in good if path.resolve() not in kept]
    num_others = max(0, limit - (len(good) - len(others)))
    for path in others[num_others:]:
        gone = aside(path, "removed")
        files.remove_tree(gone)
        files.rename(path, gone)  # so that what is left of it after a kill is no checkpoint
        files.remove_tree(gone)


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes from writing checkpoints to ``run``; a process that dies lets go.

    A lock of the POSIX kind, which workers that are forked from a killed process do not inherit.

    Raises:
        FolderInUseError: another process holds it.
        NoLocksError: the file system cannot.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        take(handle, run)
        yield
    finally:
        os.close(handle)


def take(handle: int, run: Path) -> None:
    """Lock an open file, and write into it who has."""
    if fcntl is None:
        raise NoLocksError(f"{run} is on a system without POSIX locks")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise FolderInUseError(
                f"{run}: {owner} is writing its checkpoints there. Two runs would replace and delete each other's: "
                "give this one another `output_dir`, or stop the other."
            ) from None
        raise NoLocksError(f"{run} is on a file system without locks ({error.strerror})") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
