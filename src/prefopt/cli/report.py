"""``prefopt report RUN [RUN ...]``: the report of a run, made again from its folder, or of several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from prefopt.cli.errors import UserError, users_mistakes
from prefopt.terminal import harmless

if TYPE_CHECKING:
    from prefopt.report.folder import RunFolder

__all__ = ["main"]

COMPARISON = Path("comparison.html")
STYLES = {"good": "green", "warn": "yellow", "bad": "red"}


def main(arguments: Sequence[str]) -> int:
    """The command; 0 when the page was written."""
    options = parser().parse_args(list(arguments))
    from prefopt.files import replace_file
    from prefopt.report.comparison import MOST_RUNS, compared_page
    from prefopt.report.folder import REPORT, read_folder
    from prefopt.report.run import run_page

    if len(options.runs) > MOST_RUNS:
        raise UserError(f"{len(options.runs)} runs were named; at most {MOST_RUNS} can be told apart. Name fewer.")
    with users_mistakes():
        folders = [read_folder(run) for run in options.runs]
    alone = len(folders) == 1
    target = options.output or (options.runs[0] / REPORT if alone else COMPARISON)
    try:
        replace_file(target, run_page(folders[0]) if alone else compared_page(folders))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file with --output.") from error
    say(folders, target)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefopt report",
        description="Write one HTML file about a run: curves, diagnosis, samples, pairs, data, options, time. Of "
        "several runs: their curves in one picture, their results in one table, and the options that differ.",
        epilog="Every run writes its own report.html when it ends; one that was killed has none until it is made here.",
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run (of prefopt, or of TRL)")
    made.add_argument(
        "--output", type=Path, help="the file; default RUN/report.html, for several runs ./comparison.html"
    )
    return made


def say(folders: Sequence[RunFolder], target: Path) -> None:
    """How each run went, in a few lines, and where the page is."""
    from prefopt.report.run import findings_of, shown_finding
    from prefopt.report.summary import results, verdict

    console = Console(soft_wrap=True)
    for folder in folders:
        level, sentence = verdict(folder)
        console.print(Text(harmless(f"{folder.name}: {sentence}"), STYLES[level]))
        for result in results(folder):
            console.print(Text(f"  {result}"))
        for level, text, advice in map(shown_finding, findings_of(folder)):
            console.print(Text(f"  {text} {advice}", STYLES[level]))
    console.print(Text(harmless(f"written: {target}")))
