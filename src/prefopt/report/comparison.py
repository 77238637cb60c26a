"""Several runs side by side: a page of the files in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.report.curves import PANELS, Panel, draw_line, evaluations, finish, new_figure, points
from prefopt.report.folder import RunFolder
from prefopt.report.page import rendered, vector
from prefopt.report.run import findings_of, fitting, shown_finding
from prefopt.report.summary import (
    Cells,
    figure_of,
    limited,
    lowest,
    results,
    shown,
    timing_rows,
    values_of,
    verdict,
)

__all__ = ["MOST_RUNS", "compared_page", "overlaid"]

MOST_RUNS = 8
"""As many as colours and lines can be told apart."""
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette (2008), with a grey in place of its yellow, which is hard to see on white."""
SIZE = (5.6, 3.8)
OF_A_FOLDER = {"output_dir", "logging_dir", "run_name", "hub_model_id", "user_set"}
"""Options that differ between any two runs."""
RESULTS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def compared_page(folders: Sequence[RunFolder]) -> str:
    """The page of several runs as text, below `prefopt.report.run.LARGEST` bytes.

    Args:
        folders: two to `MOST_RUNS` of them.
    """
    names = [f"{number} {shown(folder.name, 60)}" for number, folder in enumerate(folders, start=1)]
    named = list(zip(names, folders, strict=True))
    page = rendered(
        "comparison.html",
        title=f"{len(folders)} runs",
        names=names,
        runs=[(name, *verdict(folder), results(folder)) for name, folder in named],
        figures=[(panel.title, vector(overlaid(panel, named))) for panel in PANELS],
        metrics=metric_table([folder.rows for folder in folders]),
        options=option_table(folders),
        timing=timing_table(folders),
        findings=[(name, [shown_finding(finding) for finding in findings_of(folder)]) for name, folder in named],
    )
    return fitting(lambda _: page)


def overlaid(panel: Panel, named: Sequence[tuple[str, RunFolder]]) -> Any:
    """The first metric of a panel, of every run in its colour: its first evaluation set where it has one, with marks,
    above the training, which is drawn thin."""
    figure = new_figure(SIZE)
    axes, (metric, name) = figure.add_subplot(), next(iter(panel.metrics.items()))
    for colour, (run, folder) in zip(RUN_COLOURS, named, strict=False):
        evaluated = evaluations(folder.rows, metric)
        training = points(folder.rows, metric)
        draw_line(axes, training, "" if evaluated else run, colour, "-", "")
        if evaluated:
            for line in axes.get_lines()[-1:] if training[0] else ():
                line.set(alpha=0.35, linewidth=0.9, label="_")
            draw_line(axes, points(folder.rows, evaluated[0][1]), f"{run}, {evaluated[0][0]}", colour, "--", "o")
    finish(axes, panel)
    axes.set_title(f"{panel.title}{f', {name}' if name else ''}", fontsize="medium")
    figure.subplots_adjust(left=0.16, right=0.97, bottom=0.14, top=0.92)
    return figure


# -- tables, a column for each run -------------------------------------------------------------------------------------


def metric_table(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Cells]:
    """Last value of what matters, in training and of every evaluation set, and the lowest loss of each."""
    labels = dict.fromkeys(label for rows in runs for label, _ in evaluations(rows, "loss"))
    table = []
    for label, prefix in [("training", ""), *((label, f"{label}_") for label in labels)]:
        if prefix:
            best = [lowest(rows, f"{prefix}loss") for rows in runs]
            cells = ["-" if low is None else f"{figure_of(low[1])} (step {low[0]:,})" for low in best]
            table.append([f"{shown(label)}: lowest loss", *cells])
        for metric in RESULTS:
            last = [values_of(rows, f"{prefix}{metric}")[-1:] for rows in runs]
            if any(last):
                cells = [figure_of(value[0][1] if value else None) for value in last]
                table.append([f"{shown(label)}: {metric}", *cells])
    return limited(table, len(runs) + 1)


def option_table(folders: Sequence[RunFolder]) -> list[Cells]:
    """The options that are not the same in all runs, and what they trained, on what."""
    known = [
        {"method": folder.run.get("method"), **folder.known("options"), **beside_options(folder)} for folder in folders
    ]
    names = dict.fromkeys(name for options in known for name in options if name not in OF_A_FOLDER)
    table = []
    for name in names:
        values = [shown(options[name]) if name in options else "-" for options in known]
        if len(set(values)) > 1:
            table.append([shown(name), *values])
    return limited(table, len(folders) + 1)


def beside_options(folder: RunFolder) -> dict[str, Any]:
    """What decides a run beside its options, in a few words."""
    model, train = folder.known("model"), folder.known("data").get("train", {})
    return {
        "model": model.get("name"),
        "trained parameters": model.get("trained_parameters"),
        "training rows": train.get("kept"),
        **{f"version of {name}": version for name, version in folder.known("versions").items()},
    }


def timing_table(folders: Sequence[RunFolder]) -> list[Cells]:
    measured = [dict(timing_rows(folder.known("timing"))) for folder in folders]
    names = dict.fromkeys(name for rows in measured for name in rows)
    return [[name, *(rows.get(name, "-") for rows in measured)] for name in names]
