"""``prefopt report RUN [RUN ...]``: the report of a run, made again from its folder, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from prefopt.cli.errors import UserError, users_mistakes
from prefopt.cli.own_parser import OwnParser
from prefopt.terminal import harmless

if TYPE_CHECKING:
    from prefopt.report.folder import RunFolder

__all__ = ["main"]

COMPARISON = Path("comparison.html")
SWEEP = "sweep.json"
"""In the folder of a sweep."""
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
    if len(options.runs) == 1 and (options.runs[0] / SWEEP).is_file():
        return report_sweep(options.runs[0], options.html or options.runs[0] / REPORT)
    with users_mistakes():
        folders = [read_folder(run) for run in options.runs]
    alone = len(folders) == 1
    target = options.html or (options.runs[0] / REPORT if alone else COMPARISON)
    try:
        replace_file(target, run_page(folders[0]) if alone else compared_page(folders))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file with --html.") from error
    say(folders, target)
    return 0


def report_sweep(folder: Path, target: Path) -> int:
    """The page over all trials of a sweep, made again; 0."""
    from prefopt.files import replace_file
    from prefopt.sweep.overview import page
    from prefopt.sweep.state import read_sweep

    with users_mistakes():
        sweep = read_sweep(folder)
    if sweep is not None:
        try:
            replace_file(target, page(folder, sweep))
        except OSError as error:
            raise UserError(f"{target} cannot be written ({error.strerror}); name another file with --html.") from error
    print(harmless(f"written: {target}"))
    return 0


def parser() -> OwnParser:
    made = OwnParser(
        prog="prefopt report",
        description="Write one HTML file about a run: curves, diagnosis, samples, pairs, data, options, time. Of "
        "several runs: their curves in one picture, their results in one table, and the options that differ.",
        epilog="Every run writes its own report.html when it ends; one that was killed has none until it is made here.",
    )
    made.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run (of prefopt, of TRL), or of a sweep"
    )
    made.add_argument(
        "--html", type=Path, metavar="FILE", help="default RUN/report.html, for several runs ./comparison.html"
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
