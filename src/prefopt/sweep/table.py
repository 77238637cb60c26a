"""The trials of a sweep in the terminal: a table that stays in place, or a line for each change where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prefopt.sweep.state import Status, Sweep, Trial
from prefopt.sweep.summary import Seen, compact, counted, duration, one, remaining, seen, trial_rows
from prefopt.terminal import harmless

__all__ = ["Display", "display", "print_table", "sparkline", "trials_table"]

BARS = "▁▂▃▄▅▆▇█"
POINTS = 16
"""Evaluations in a sparkline, the newest ones."""
SECONDS_BETWEEN = 0.25
"""Between two tables of trials that are where they were but for their steps."""
LINES_BESIDE = 6
"""Of the terminal's height: header, rules, caption and the prompt."""
STYLES = {
    Status.RUNNING: "bold cyan",
    Status.FINISHED: "green",
    Status.FAILED: "bold red",
    Status.PRUNED: "yellow",
    Status.STOPPED: "yellow",
}
DIMMED = (Status.PRUNED, Status.STOPPED, Status.WAITING)
FIRST_TO_GO = ("best", "left", "time", "loss", "accuracy", "margin", "step")
"""Columns that a narrow terminal has no room for."""
UNBOUNDED = 1000
"""Width at which nothing is cut, in characters."""


class Display:
    """What is shown while a sweep runs.

    Args:
        console: where.
        folder: of the sweep.
        live: the table that stays in place; None: lines.
    """

    def __init__(self, console: Console, folder: Path, live: Live | None) -> None:
        self.console, self.folder, self.live = console, folder, live
        self.statuses: dict[str, tuple[Status, int]] = {}
        self.last = float("-inf")

    def update(self, sweep: Sweep, name: str | None = None) -> None:
        """Show how the sweep stands.

        Args:
            sweep: all trials.
            name: the trial that has changed; without a terminal it gets a line when its chunk has ended.
        """
        if self.live is None:
            for trial in sweep.trials:
                if trial.name == name and trial.status not in (Status.RUNNING, Status.WAITING):
                    self.print_line(sweep, trial)
            return
        statuses = {trial.name: (trial.status, 0) for trial in sweep.trials}
        if statuses == self.statuses and time.monotonic() - self.last < SECONDS_BETWEEN:
            return
        self.statuses = statuses
        self.live.update(trials_table(sweep, seen(self.folder, sweep), self.console), refresh=True)
        self.last = time.monotonic()

    def print_line(self, sweep: Sweep, trial: Trial) -> None:
        if self.statuses.get(trial.name) != (trial.status, trial.steps):
            self.statuses[trial.name] = trial.status, trial.steps
            self.console.print(line(sweep, one(trial, {}, trial_rows(self.folder, trial.name))), soft_wrap=True)


@contextmanager
def display(folder: Path, console: Console | None = None) -> Iterator[Display]:
    """Shows a sweep within; the terminal is as it was, with the last table in it, however that ends."""
    console = console or Console()
    if not console.is_terminal:
        yield Display(console, folder, None)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield Display(console, folder, live)


def print_table(folder: Path, sweep: Sweep, console: Console | None = None) -> None:
    """Print how the sweep in a folder stands."""
    console = console or Console()
    if not console.is_terminal:
        console.width = UNBOUNDED
    console.print(trials_table(sweep, seen(folder, sweep), console, all_of_them=True))


def trials_table(sweep: Sweep, trials: Sequence[Seen], console: Console, *, all_of_them: bool = False) -> Table:
    """The trials, best first, as many as the terminal has lines for, and the columns that it has room for."""
    room = max(3, console.height - LINES_BESIDE)
    shown = trials if all_of_them or not console.is_terminal else trials[:room]
    end = remaining(trials)
    caption = [counted(sweep.trials), f"{duration(end)} left" if end else ""]
    caption += [f"{len(trials) - len(shown)} not shown"] if len(shown) < len(trials) else []
    scale = [value for item in trials for value in item.values.values()]
    rows = [(item, cells(sweep, item, scale, console)) for item in shown]
    columns = ["trial", "status", "step", sweep.metric, "loss", "margin", "accuracy", "best", "time", "left"]
    options = console.options.update(max_width=UNBOUNDED)
    while True:
        table = Table(box=None, padding=(0, 2, 0, 0), caption_justify="left")
        table.caption = Text(", ".join(part for part in caption if part), style="dim")
        for name in columns:
            left = name in ("trial", "status", sweep.metric)
            table.add_column(Text(harmless(name)), justify="left" if left else "right", no_wrap=True)
        for item, texts in rows:
            table.add_row(*(texts[name] for name in columns), style="dim" if item.trial.status in DIMMED else None)
        droppable = [name for name in FIRST_TO_GO if name in columns]
        if not droppable or not console.is_terminal or console.measure(table, options=options).maximum <= console.width:
            return table
        columns.remove(droppable[0])


def cells(sweep: Sweep, item: Seen, scale: Sequence[float], console: Console) -> dict[str, Text]:
    """Column -> what stands there."""
    trial = item.trial
    drawn = sparkline(item.values, scale) if console.encoding.startswith("utf") else ""
    texts = {
        "trial": harmless(trial.name),
        "step": progress(item),
        sweep.metric: f"{compact(trial.last)} {drawn}",
        "loss": compact(item.loss),
        "margin": compact(item.margin),
        "accuracy": compact(item.accuracy),
        "best": compact(trial.best),
        "time": duration(trial.seconds) if trial.seconds else "",
        "left": duration(item.seconds_left) if item.seconds_left else "",
    }
    status = Text(trial.status, style=STYLES.get(trial.status, ""))
    return {"status": status} | {name: Text(text) for name, text in texts.items()}


def progress(item: Seen) -> str:
    return f"{item.trial.steps}/{item.trial.max_steps or '?'}"


def line(sweep: Sweep, item: Seen) -> Text:
    """A trial in one line: ``03-beta0.5  paused  25/100  loss 0.610  eval_rewards/accuracies 0.720  12 s``."""
    trial = item.trial
    figures = {"loss": item.loss, "margin": item.margin, harmless(sweep.metric): trial.last}
    parts = [harmless(trial.name), str(trial.status), progress(item)]
    parts += [f"{name} {compact(value)}" for name, value in figures.items() if value is not None]
    parts += [duration(trial.seconds), *([harmless(trial.reason)] if trial.reason else [])]
    return Text("  ".join(parts))


def sparkline(values: Mapping[int, float], scale: Sequence[float]) -> str:
    """The newest values as bars, on the scale of all trials' values.

    >>> sparkline({1: 0.0, 2: 0.5, 3: 1.0}, [0.0, 1.0])
    '▁▅█'
    """
    newest = [value for _, value in sorted(values.items())][-POINTS:]
    if not newest:
        return ""
    low, width = min(scale), max(scale) - min(scale)
    places = [round((value - low) / width * (len(BARS) - 1)) if width else len(BARS) // 2 for value in newest]
    return "".join(BARS[place] for place in places)
