"""Text of data and models as a terminal may show it."""

from __future__ import annotations

__all__ = ["harmless"]

KEPT = "\n\t"


def harmless(text: str) -> str:
    r"""``text`` with whatever a terminal would obey written out: escape sequences, carriage returns, directions.

    Those are the characters that Python does not call printable, but for line breaks and tabs.

    >>> harmless("red \x1b[31m, back\r, turned \u202e")
    'red \\x1b[31m, back\\r, turned \\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in KEPT else c.encode("unicode_escape").decode("ascii") for c in text)
