"""What is drawn of a run when it ends. It is of the files of its folder, and what goes wrong in it is no failure."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.files import replace_file
from prefopt.report.curves import draw, png
from prefopt.report.folder import REPORT
from prefopt.trainer.ending.record import CURVES, METRICS, read_rows

__all__ = ["VARIABLE", "is_off", "report", "spared"]

logger = logging.getLogger(__name__)

VARIABLE = "PREFOPT_REPORT"
"""``off``: no ``pairs.jsonl``, ``curves.png`` and ``report.html``."""


def is_off() -> bool:
    """Whether the environment says that nothing is drawn."""
    return os.environ.get(VARIABLE) == "off"


def report(folder: Path, title: str) -> None:
    """Draw ``curves.png`` and write ``report.html``.

    Args:
        folder: of the run.
        title: of the curves.
    """
    if is_off():
        return
    from prefopt.report.run import write_report  # templates, which no run needs before its end

    with spared(folder / CURVES):
        if rows := read_rows(folder / METRICS):
            replace_file(folder / CURVES, png(draw(rows, title)))
    with spared(folder / REPORT):
        logger.info("written: %s", write_report(folder))


@contextmanager
def spared(what: Path | str) -> Iterator[None]:
    """What goes wrong within, whatever it is, changes nothing of the run and of how it ends."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not made: %r", what, error)
