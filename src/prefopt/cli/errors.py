"""What is the user's to mend, as one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "users_mistakes"]


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
