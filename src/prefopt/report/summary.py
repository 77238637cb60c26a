"""What a run's files come to, as sentences and as rows of tables; all text is made fit to be shown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from prefopt.report.curves import evaluations
from prefopt.report.folder import RunFolder
from prefopt.terminal import harmless

__all__ = [
    "data_rows",
    "duration",
    "figure_of",
    "lowest",
    "metric_rows",
    "model_rows",
    "moment",
    "option_rows",
    "results",
    "shown",
    "skipped_rows",
    "timing_rows",
    "verdict",
]

LONGEST_VALUE = 300
"""Characters of a value in a table."""
MOST_ROWS = 250
"""Of a table."""
LEAST_SHARE = 0.005
"""Of the time: a part below it is not shown."""
NOT_SHOWN = ("_runtime", "_per_second", "total_flos", "epoch")
"""Ends of the names of logged values that are told elsewhere."""

Cells = list[str]


def shown(value: Any, longest: int = LONGEST_VALUE) -> str:
    """A value as text that does nothing where it is shown, cut to ``longest`` characters."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return figure_of(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = f" [{len(text) - longest:,} characters left out]" if len(text) > longest else ""
    return harmless(text[:longest]) + left_out


def figure_of(value: float | None) -> str:
    """A number with four digits that count; a dash for none.

    >>> figure_of(0.123456), figure_of(12345.6), figure_of(5e-7), figure_of(None)
    ('0.1235', '12,346', '5e-07', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """
    >>> duration(3.14159), duration(75), duration(7322)
    ('3.1 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(time: Any) -> str:
    """
    >>> moment("2026-05-04T12:00:00.123+00:00")
    '2026-05-04 12:00:00 UTC'
    """
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (TypeError, ValueError):
        return shown(time)


def values_of(rows: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Steps and finite values of a metric, in the order in which they were logged."""
    found = [(row["step"], row[metric]) for row in rows if metric in row]
    return [(step, float(v)) for step, v in found if type(v) in (int, float) and math.isfinite(v)]


def lowest(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float] | None:
    """Step and value where a metric was lowest; the first of several."""
    return min(values_of(rows, metric), key=lambda point: point[1], default=None)


# -- sentences ---------------------------------------------------------------------------------------------------------


def verdict(folder: RunFolder) -> tuple[str, str]:
    """How the run ended, as a level (``good``, ``warn``, ``bad``) and a sentence."""
    run = folder.run
    steps = run.get("steps") or max((row["step"] for row in folder.rows), default=0)
    method = shown(run.get("method") or "run").upper() if run else "A run without run.json"
    after = f"after {steps:,} optimizer steps{elapsed(folder)}"
    why = folder.known("reason")
    what = f"{shown(why.get('type', ''))}: {shown(why.get('message', ''), 1500)}"
    status = run.get("status")
    if status == "finished":
        return "good", f"{method} finished {after}."
    if status == "failed":
        return "bad", f"{method} failed {after}. {what}"
    if status == "interrupted":
        return "warn", f"{method} was interrupted {after}. {what}"
    if status == "paused":
        return "warn", f"{method} is paused {after}."
    if status == "running":
        last = moment(folder.rows[-1].get("time")) if folder.rows else "none"
        text = f"{method} still runs, or was killed: it has left no last word. Steps that were logged: {steps:,}."
        return "warn", f"{text} Last row: {last}."
    return "warn", f"{method}: {steps:,} optimizer steps were logged."


def elapsed(folder: RunFolder) -> str:
    """The time; of a run that went on with another, of its own steps alone, as `started` is its own."""
    run = folder.run
    try:
        start, end = (datetime.fromisoformat(run[key]) for key in ("started", "ended"))
        seconds = (end - start).total_seconds()
    except (KeyError, TypeError, ValueError):
        return ""
    own, steps = folder.known("timing").get("steps"), run.get("steps") or 0
    of_them = f"the last {own:,} of them " if own is not None and own < steps else ""
    return f", {of_them}in {duration(seconds)}"


def results(folder: RunFolder) -> list[str]:
    """A sentence for each evaluation set, or for the training where there is none."""
    rows = folder.rows
    sets = [(label, f"{label}_") for label, _ in evaluations(rows, "loss")] or [("training", "")]
    return [sentence for label, prefix in sets if (sentence := result(rows, label, prefix))]


def result(rows: Sequence[Mapping[str, Any]], label: str, prefix: str) -> str:
    losses, best = values_of(rows, f"{prefix}loss"), lowest(rows, f"{prefix}loss")
    if best is None:
        return ""
    text = f"{shown(label)}: loss {figure_of(losses[-1][1])} at the end"
    if best[1] < losses[-1][1]:
        text += f" (lowest {figure_of(best[1])} at step {best[0]:,})"
    elif len(losses) > 1:
        text += ", its lowest"
    accuracies, margins = (values_of(rows, f"{prefix}rewards/{name}") for name in ("accuracies", "margins"))
    if accuracies and margins:
        text += f"; reward accuracy {accuracies[-1][1]:.1%}, margin {figure_of(margins[-1][1])}"
    return f"{text}."


# -- tables ------------------------------------------------------------------------------------------------------------


def metric_rows(rows: Sequence[Mapping[str, Any]]) -> list[Cells]:
    """Name, first, last, lowest and highest value of every logged metric, with the steps of the extremes."""
    found = []
    for name in dict.fromkeys(chain.from_iterable(rows)):
        if name == "step" or name.endswith(NOT_SHOWN) or not (points := values_of(rows, name)):
            continue
        low, high = (best(points, key=lambda point: point[1]) for best in (min, max))
        ends = (f"{figure_of(value)} (step {step:,})" if len(points) > 1 else "" for step, value in (low, high))
        found.append([shown(name), figure_of(points[0][1]), figure_of(points[-1][1]), *ends])
    return limited(sorted(found, key=lambda cells: cells[0].startswith("eval_")), 5)


def option_rows(run: Mapping[str, Any], *, were_set: bool) -> list[Cells]:
    """Option and value: those that the user set, or all others."""
    options, names = run.get("options") or {}, set(run.get("options_set") or ())
    found = [[shown(name), shown(value)] for name, value in options.items() if (name in names) is were_set]
    return limited([cells for cells in found if cells[0] != "user_set"], 2)


def data_rows(data: Mapping[str, Mapping[str, Any]]) -> list[Cells]:
    """Set, where it is from, rows, kept, cut to max_length."""
    found = []
    for name, known in data.items():
        sources = dict.fromkeys(filter(None, [known.get("name"), *(known.get("files") or ())]))
        source = ", ".join(shown(source) for source in sources)
        cells = [share(known.get(key), known.get("rows")) for key in ("kept", "truncated")]
        found.append([shown(name), source, count(known.get("rows")), *cells])
    return limited(found, 5)


def skipped_rows(data: Mapping[str, Mapping[str, Any]]) -> list[Cells]:
    """Set, reason, how many rows were skipped for it, and their numbers."""
    found = []
    for name, known in data.items():
        for reason, of_it in (known.get("skipped") or {}).items():
            numbers, num = of_it.get("rows", []), of_it.get("num", 0)
            more = f" and {num - len(numbers):,} more" if num > len(numbers) else ""
            found.append([shown(name), shown(reason), f"{num:,}", ", ".join(map(shown, numbers)) + more])
    return limited(found, 4)


def count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def share(value: Any, of: Any) -> str:
    if not isinstance(value, int) or not isinstance(of, int) or not of:
        return count(value)
    return f"{value:,} ({value / of:.1%})"


PARTS: dict[str, str] = {
    "training": "training steps",
    "evaluation": "evaluation, with samples",
    "reference": "the reference's pass before training",
    "saving": "checkpoints",
}


def timing_rows(timing: Mapping[str, Any]) -> list[Cells]:
    """What was measured, in words."""
    seconds = timing.get("seconds") or {}
    total, training = sum(seconds.values()), seconds.get("training", 0.0)
    ordered = sorted(seconds.items(), key=lambda part: -part[1])
    parts = {name: spent for name, spent in ordered if total and spent / total >= LEAST_SHARE}
    found = [[PARTS.get(name, shown(name)), f"{duration(s)} ({s / total:.0%})"] for name, s in parts.items()]
    for name in ("steps", "pairs", "tokens"):
        if training and timing.get(name):
            found.append([f"{name} per second of training", figure_of(timing[name] / training)])
    memory = timing.get("peak_memory") or {}
    places = {"device": "most memory on the device", "host": "most memory of the process"}
    return found + [[text, f"{memory[name] / 2**30:.2f} GiB"] for name, text in places.items() if name in memory]


def model_rows(run: Mapping[str, Any]) -> list[Cells]:
    """What was trained, on what, with which versions."""
    model, machine = run.get("model") or {}, run.get("machine") or {}
    sizes = [model.get(name) for name in ("parameters", "trained_parameters")]
    trained = f"{count(sizes[1])} of {count(sizes[0])}" if sizes[0] else None
    named: dict[str, Any] = {
        "model": f"{model.get('name') or ''} ({model.get('class')})" if model else None,
        "trained parameters": trained,
        "adapters": ", ".join(model.get("adapters") or ()) or None,
        "type of the weights": model.get("dtype"),
        "reference": model.get("reference") or ("none" if model else None),
        "losses": ", ".join(map(str, run.get("losses") or ())) or None,
        "layout of the batches": model.get("layout"),
        **{name: machine.get(name) for name in ("device", "processes", "cores", "threads", "system", "python")},
        **(run.get("versions") or {}),
    }
    return limited([[shown(name), shown(value)] for name, value in named.items() if value is not None], 2)


def limited(rows: list[Cells], width: int) -> list[Cells]:
    """At most `MOST_ROWS`, with a last row that says how many are left out."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [*rows[:MOST_ROWS], [f"{len(rows) - MOST_ROWS:,} more", *[""] * (width - 1)]]
