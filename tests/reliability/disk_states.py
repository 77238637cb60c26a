"""What is on the disk at each operation of a run: what a kill, or a crash of the machine, would leave there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from prefopt.checkpoints.folder import checkpoints_in, put_in_order
from prefopt.checkpoints.manifest import faults
from prefopt.files import Operation


class DiskStates:
    """An observer of `prefopt.files.observed` that keeps the disk before each operation, in folders of their own.

    A kill leaves what was written, and half of a folder that is being removed. A crash of the machine leaves no more
    for sure than what was synced: there all other files are cut in half.
    """

    def __init__(self, run: Path, into: Path, saved: Callable[[], int]) -> None:
        self.run, self.into, self.saved = run, into, saved
        self.states: list[tuple[str, Path, int]] = []
        """What was about to happen, the folder, and the last step whose save was done."""
        self.synced = {path.stat().st_ino for path in run.rglob("*")}  # what was there before is there
        self.next_synced: int | None = None

    def __call__(self, operation: Operation, path: Path) -> None:
        if self.next_synced is not None:
            self.synced.add(self.next_synced)
        self.next_synced = path.stat().st_ino if operation == "sync" and path.is_file() else None
        if self.run not in path.parents and path != self.run:
            return
        name = f"{operation} {path.relative_to(self.run)}"
        self.keep(f"{name}, killed")
        for file in files_in(self.keep(f"{name}, crashed")):
            if file.stat().st_ino not in self.synced:
                content = file.read_bytes()
                file.unlink()
                file.write_bytes(content[: len(content) // 2])
        if operation == "remove" and path.is_dir():
            state = self.keep(f"{name}, killed in the middle")
            for file in files_in(state / path.relative_to(self.run))[::2]:
                file.unlink()

    def keep(self, what: str) -> Path:
        """The disk as it is."""
        folder = self.into / str(len(self.states)) / "run"
        shutil.copytree(self.run, folder, copy_function=os.link)
        self.states.append((what, folder, self.saved()))
        return folder


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest_good(run: Path) -> int:
    """The step that the next start goes on from, after it has put the folder in order; 0 for none."""
    put_in_order(run)
    return newest_whole(run)


def newest_whole(run: Path) -> int:
    """The step of the newest good checkpoint under its own name; 0 for none."""
    return next((step for step, folder in checkpoints_in(run).items() if not faults(folder)), 0)
