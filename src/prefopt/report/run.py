"""The report of one run: a page of the files in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefopt.files import replace_file
from prefopt.report.curves import separate
from prefopt.report.diagnosis import Finding, diagnose
from prefopt.report.folder import REPORT, RunFolder, read_folder
from prefopt.report.page import rendered, vector
from prefopt.report.summary import (
    data_rows,
    metric_rows,
    model_rows,
    moment,
    option_rows,
    results,
    shown,
    skipped_rows,
    timing_rows,
    verdict,
)
from prefopt.report.texts import shown_pairs, shown_samples

__all__ = ["LARGEST", "findings_of", "fitting", "run_page", "write_report"]

LARGEST = 2_000_000
"""Bytes of a page."""
LENGTHS = (1500, 300, 60)
"""Characters of a text of the data: the first with which the page is not too large."""


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write ``report.html`` into a run's folder, or elsewhere; returns where.

    Args:
        folder: of the run.
        target: the file; None: ``report.html`` in the folder.

    Raises:
        FileNotFoundError: no run has written to the folder.
    """
    target = target or folder / REPORT
    replace_file(target, run_page(read_folder(folder)))
    return target


def run_page(folder: RunFolder) -> str:
    """The page as text, below `LARGEST` bytes."""
    level, sentence = verdict(folder)
    run, data = folder.run, folder.known("data")
    figures = [(title, vector(figure)) for title, figure in separate(folder.rows)] if folder.rows else []
    values = {
        "title": f"{shown(run.get('method') or 'run').upper()}: {shown(folder.name)}",
        "level": level,
        "verdict": sentence,
        "results": results(folder),
        "findings": [shown_finding(finding) for finding in findings_of(folder)],
        "figures": figures,
        "metrics": metric_rows(folder.rows),
        "data": data_rows(data),
        "skipped": skipped_rows(data),
        "timing": timing_rows(folder.known("timing")),
        "set_options": option_rows(run, were_set=True),
        "other_options": option_rows(run, were_set=False),
        "versions": model_rows(run),
        "resume": run.get("resume") and shown(run["resume"]),
        "checkpoint": run.get("checkpoint") and shown(run["checkpoint"]),
        "started": " to ".join(moment(run[name]) for name in ("started", "ended") if run.get(name)),
    }
    return fitting(
        lambda longest: rendered(
            "run.html",
            **values,
            pairs=shown_pairs(folder.pairs, longest),
            samples=shown_samples(folder.samples, longest),
        )
    )


def fitting(render: Callable[[int], str]) -> str:
    """The page with the longest texts that is not too large.

    Args:
        render: characters of a text -> the page.
    """
    pages = (render(longest) for longest in LENGTHS)
    return next((page for page in pages if len(page.encode()) < LARGEST), None) or render(0)


def findings_of(folder: RunFolder) -> list[Finding]:
    """What the numbers of a run say; see docs/numbers.md."""
    return diagnose(folder.rows, {**folder.run, "samples": folder.samples})


def shown_finding(finding: Finding) -> tuple[str, str, str]:
    """Level, text and advice."""
    place = "" if finding.step is None else f", from step {finding.step:,}"
    return finding.level, f"{shown(finding.name)}{place}: {shown(finding.text, 1000)}", shown(finding.advice, 1000)
