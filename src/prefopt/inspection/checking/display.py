"""A check as one reads it in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.data.report import SKIPPED
from prefopt.inspection.checking.check import Checked, ModelFacts
from prefopt.inspection.checking.need import Need, duration, parts
from prefopt.inspection.checking.problems import LEVELS, Problem
from prefopt.inspection.checking.rows import CheckedRows
from prefopt.inspection.checking.trial import Trial
from prefopt.terminal import harmless
from prefopt.trainer.memory import readable

__all__ = ["show"]

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
COVERS = {
    "resident": "memory, Python among it",
    "device, allocated": "device memory, in tensors",
    "device, reserved": "device memory, as taken",
}
"""Kinds of peak memory, in words."""


def show(checked: Checked, need: Need | None, console: Console) -> None:
    """Prints what there is: rows, lengths, model, step, memory, time, and the list of problems."""
    if checked.sets:
        console.print(rows_table(checked.sets))
    if any(rows.lengths for rows in checked.sets):
        console.print(lengths_table(checked.sets))
    if checked.model is not None and checked.trial is not None:
        for line in model_lines(checked.model, checked.trial):
            console.print(Text(harmless(line)))
        console.print(needs_table(checked.trial, need))
    for level in LEVELS:
        for problem in checked.findings.of(level):
            console.print(problem_text(problem))
    numbers = [(checked.findings.count(level), level) for level in LEVELS]
    counts = [f"{number:,} {level}{'s' * (number != 1)}" for number, level in numbers]
    verdict = "The run will go through" if checked.findings.will_run else "The run will not go through"
    console.print(Text(f"{verdict}: {', '.join(counts)}.", style="green" if checked.findings.will_run else "bold red"))


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and the others numbers."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=any(columns)
    )
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index else "left")
    return made


def rows_table(sets: list[CheckedRows]) -> Table:
    """Every row of each set, by what becomes of it."""
    made = table("rows", "", *(rows.name for rows in sets))
    lines: list[tuple[str, list[int]]] = [
        ("in all", [rows.num_rows for rows in sets]),
        ("broken", [len(rows.broken) for rows in sets]),
        *((f"left out: {why}", [len(rows.report.skipped.get(why, ())) for rows in sets]) for why in SKIPPED.values()),
        ("trained on, evaluated", [0 if rows.prepared is None else len(rows.prepared) for rows in sets]),
        ("of these cut to max_length", [rows.report.num_truncated for rows in sets]),
        ("of these with tokens that merge at the prompt's end", [rows.report.num_merged for rows in sets]),
    ]
    for index, (name, counts) in enumerate(lines):
        if index in (0, len(lines) - 3) or any(counts):
            made.add_row(name, *(f"{count:,}" for count in counts))
    return made


def lengths_table(sets: list[CheckedRows]) -> Table:
    made = table("tokens, as trained on", "", "mean", "median", "95 %", "most")
    for rows in sets:
        for item in rows.lengths:
            numbers = (item.mean, item.median, item.high, item.most)
            made.add_row(f"{rows.name}: {item.part}", *(f"{number:,.0f}" for number in numbers))
    return made


def model_lines(model: ModelFacts, trial: Trial) -> list[str]:
    """The model, and its first step."""
    share = f"{model.trained / model.parameters:.2%}" if model.trained < model.parameters else "all"
    expected = "" if trial.expected_loss is None else " (ln 2, where policy and reference are one, is 0.6931)"
    return [
        f"model  {model.name}, {model.parameters:,} parameters, {share} of them trained, in {model.precision} on "
        f"{model.device}; batches in layout {model.layout}",
        f"step   loss {trial.loss:.4f}{expected}, gradient norm {trial.grad_norm:.4g}, learning rate "
        f"{trial.learning_rate:.3g}",
    ]


def needs_table(trial: Trial, need: Need | None) -> Table:
    """Memory at its peak, and time."""
    made = table("the run will need, about", "", "")
    for kind, size in trial.peak.items():
        made.add_row(COVERS[kind], readable(size))
    for name, seconds in parts(need, trial.plan.num_steps) if need is not None else ():
        made.add_row(name, duration(seconds))
    return made


def problem_text(problem: Problem) -> Text:
    """One line: how bad, where, what, and what to do."""
    made = Text()
    made.append(f"{problem.level}: ", style=STYLES[problem.level])
    made.append(f"{harmless(problem.place)}: ", style="bold")
    made.append(harmless(problem.what).rstrip("."))
    if problem.fix:
        fix: Any = harmless(problem.fix)
        made.append(f". {fix[0].upper()}{fix[1:]}")
    return made
