"""What the folder of a run holds, read again: nothing else is needed to report on it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["REPORT", "RunFolder", "read_folder", "read_mapping", "read_rows"]

REPORT = "report.html"
LAST_STEP = 1e15
"""No run has as many."""
Row = dict[str, Any]
NUMBER = (int, float)
RUN_SHAPE = {
    "steps": int,
    "losses": list,
    "options": {},
    "options_set": [str],
    "reason": {},
    "versions": {},
    "machine": {},
    "model": {"parameters": int, "trained_parameters": int, "adapters": [str]},
    "timing": {"seconds": {"*": NUMBER}, "peak_memory": {"*": NUMBER}, "steps": int, "pairs": int, "tokens": NUMBER},
    "data": {
        "*": {
            "name": str,
            "files": [str],
            "rows": int,
            "kept": int,
            "truncated": int,
            "skipped": {"*": {"num": int, "rows": list}},
        }
    },
}
"""What is computed with of ``run.json``, see `of_shape`."""


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it.

    Args:
        name: of the folder.
        run: ``run.json``; empty for a run of TRL's.
        rows: of ``metrics.jsonl``; of a run of TRL's, the log in its newest checkpoint.
        samples: of ``samples.jsonl``.
        pairs: of ``pairs.jsonl``.
    """

    name: str
    run: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)

    def known(self, name: str) -> Row:
        """A mapping of ``run.json``; empty where it is missing."""
        value = self.run.get(name)
        return value if isinstance(value, dict) else {}


def read_folder(folder: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        FileNotFoundError: there is no such folder, or no run has written to it.
        ValueError: ``metrics.jsonl`` is something else.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name the output_dir of a run.")
    run: Row = of_shape(read_mapping(folder / "run.json"), RUN_SHAPE)
    rows = stepped(read_rows(folder / "metrics.jsonl", strict=True)) or logged(folder)
    if not run and not rows:
        raise FileNotFoundError(
            f"{folder} has neither run.json, metrics.jsonl nor a checkpoint with trainer_state.json, so that it is no "
            "run's; name the output_dir of one."
        )
    found = RunFolder(folder.resolve().name, run, rows, pairs=stepped(read_rows(folder / "pairs.jsonl")))
    if not found.known("options").get("generate_during_eval"):
        return found  # it leaves the samples of a run before it as they are
    return replace(found, samples=stepped(read_rows(folder / "samples.jsonl")))


def read_rows(path: Path, *, strict: bool = False) -> list[Row]:
    """The lines of a file of JSON objects; a last line that was not written to its end is none.

    Raises:
        ValueError: with ``strict``, the file is something else.
    """
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if strict and not rows and text.strip() and not text.startswith("{"):
        raise ValueError(f"{path} has no line that is JSON, so that it is no file of a run's; move it away.")
    return rows


def read_mapping(path: Path) -> Row:
    """A JSON object; empty where there is none, or it was not written to its end."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def stepped(rows: Iterable[Any]) -> list[Row]:
    """The rows that say of which step they are."""
    return [row for row in rows if isinstance(row, dict) and is_step(row.get("step"))]


def is_step(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < LAST_STEP  # NaN is neither


def of_shape(value: Any, shape: Any) -> Any:
    """``value`` without what is of another kind than ``shape`` says; None where it is itself.

    Args:
        value: of JSON.
        shape: types; a list of the type that the items of a list have; or a mapping of key -> shape, in which ``"*"``
            stands for all other keys.
    """
    if isinstance(shape, list):
        return [item for item in value if isinstance(item, shape[0])] if isinstance(value, list) else None
    if not isinstance(shape, dict):
        return value if isinstance(value, shape) else None
    if not isinstance(value, dict):
        return None
    shapes = {key: shape.get(key, shape.get("*", object)) for key in value}
    found = {key: of_shape(item, shapes[key]) for key, item in value.items()}
    return {key: item for key, item in found.items() if item is not None or shapes[key] is object}


def logged(folder: Path) -> list[Row]:
    """The log in the newest checkpoint, as transformers and TRL write it."""
    states = [read_mapping(place / "trainer_state.json") for place in (folder, *folder.glob("checkpoint-*"))]
    histories = [state["log_history"] for state in states if isinstance(state.get("log_history"), list)]
    return stepped(max(histories, key=len, default=[]))
