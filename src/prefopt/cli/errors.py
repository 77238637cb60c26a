"""What is the user's to mend, as one message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["UserError", "check_writable", "users_mistakes", "write_wanted"]


class UserError(Exception):
    """A mistake in the command line, a run file or the data, or an end of a run that says what to do: one message;
    PREFOPT_TRACEBACK=1 shows the traceback."""


@contextmanager
def users_mistakes() -> Iterator[None]:
    """What goes wrong within is the user's to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except RecursionError as error:
        raise UserError(f"a value is nested too deep ({error})") from error


def check_writable(option: str, path: str | None) -> None:
    """Hold a file that is to be written against the disk, before the work whose outcome it takes.

    Raises:
        UserError: it is a folder, or its folder is not there or not to be written to.
    """
    if path is None:
        return
    file = Path(path)
    why = None
    if not path or file.is_dir():
        why = "is a folder; name a file"
    elif not file.parent.is_dir():
        why = f"there is no folder {file.parent}; make it first"
    elif not os.access(file.parent, os.W_OK):
        why = f"the folder {file.parent} cannot be written to"
    if why is not None:
        raise UserError(f"{option} {path}: {why}")


def write_wanted(option: str, path: str, content: str) -> None:
    """Writes a file that an option names.

    Raises:
        UserError: the system refuses it.
    """
    from prefopt.files import replace_file

    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{option} {path}: it cannot be written ({error})") from error
