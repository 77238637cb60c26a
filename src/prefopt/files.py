"""Files that are whole or not there, at whatever moment the process or the machine stops.

Every write that must survive goes through here, so that a test can stand at each one (`observed`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

__all__ = [
    "announce",
    "append_line",
    "observed",
    "remove_tree",
    "rename",
    "replace_file",
    "sync_folder",
    "sync_tree",
    "write_file",
]

Operation = Literal["write", "sync", "rename", "remove"]
Observer = Callable[[Operation, Path], None]
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""What systems without a sync of folders answer."""

_observer: Observer | None = None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """``observer`` is called before each operation, with its path: to count, to raise (a full disk), or to kill."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def announce(operation: Operation, path: str | os.PathLike[str]) -> None:
    """Tell the observer of an operation that is about to be made, also by a library that writes by itself."""
    if _observer is not None:
        _observer(operation, Path(path))


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write and sync. A stop meanwhile leaves part of it: for folders that are renamed when they are complete."""
    data = content.encode() if isinstance(content, str) else content
    announce("write", path)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        announce("sync", path)
        os.fsync(file.fileno())


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write beside, sync, rename: at any moment there is the old content or the new."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        write_file(beside, content)
        rename(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append one line in one write, which a killed process has made or not; a crash of the machine may lose it."""
    announce("write", path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename a file or folder, and make the new name last."""
    announce("rename", target)
    os.replace(source, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder last, where the system can."""
    announce("sync", folder)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Make all files and names under a folder last, innermost first, whoever wrote them; modes are the umask's."""
    mode = 0o666 & ~_umask()
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        else:
            announce("sync", path)
            with suppress(OSError):  # some file systems have no modes
                path.chmod(mode)  # safetensors' are its writer's alone
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _umask() -> int:
    """What new files of this process may not be; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Delete a folder; not there is fine."""
    announce("remove", folder)
    shutil.rmtree(folder, ignore_errors=True)
