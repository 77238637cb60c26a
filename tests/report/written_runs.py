"""Folders of runs, written by hand: what a report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x"> \x1b[31m \u202e $x^{$ \ud800'
"""Markup, an address, an escape sequence, a change of direction, a broken formula, half a character."""
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def rows(num_steps: int = 20, sets: Sequence[str] = ("eval",), every: int = 5) -> list[dict[str, Any]]:
    """Falling losses, rising margins; ``every`` so many steps an evaluation of all sets."""
    found: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        done = step / num_steps
        values = dict(zip(METRICS, (0.7 - 0.4 * done, 2 * done, 0.5 + 0.4 * done, -20.0, -20 - 9 * done), strict=True))
        found.append({"step": step, "time": "2026-05-04T12:00:00+00:00", **values, "learning_rate": 1e-5 * (1 - done)})
        found[-1]["grad_norm"] = 1 + done
        if step % every == 0:
            found += [{"step": step, **{f"{name}_{metric}": values[metric] for metric in METRICS}} for name in sets]
    return found


def run(**values: Any) -> dict[str, Any]:
    """``run.json`` of a run that finished."""
    return {
        "method": "dpo",
        "status": "finished",
        "started": "2026-05-04T12:00:00.000+00:00",
        "ended": "2026-05-04T12:01:40.000+00:00",
        "steps": 20,
        "checkpoint": None,
        "resume": None,
        "options": {"beta": 0.1, "learning_rate": 1e-5, "seed": 42, "generate_during_eval": True},
        "options_set": ["beta"],
        "data": {
            "train": {
                "name": "trl-lib/some",
                "rows": 100,
                "kept": 98,
                "truncated": 7,
                "skipped": {"chosen equal to rejected": {"num": 2, "rows": [3, 41]}},
            }
        },
        "timing": {
            "seconds": {"training": 80.0, "evaluation": 20.0},
            "steps": 20,
            "pairs": 160,
            "tokens": 8000,
            "peak_memory": {"host": 2**30},
        },
        "versions": {"prefopt": "0.1.0"},
        **values,
    }


def pair(row: int, margin: float, end: str, text: str = "words", of: str = "eval") -> dict[str, Any]:
    sides = {f"{name}_{side}": margin for name in ("reward", "logps") for side in ("chosen", "rejected")}
    texts = {name: f"{name} {text}" for name in ("prompt", "chosen", "rejected")}
    lengths = {"tokens_chosen": 5, "tokens_rejected": 6}
    return {"set": of, "step": 20, "end": end, "row": row, "margin": margin, **sides, **lengths, **texts}


def sample(step: int, text: str = "", of: str = "eval") -> dict[str, Any]:
    texts = {name: f"{name} {text}" for name in ("prompt", "chosen", "rejected")}
    return {"set": of, "step": step, **texts, "policy": f"said at {step} {text}", "reference": f"said at 0 {text}"}


def write(
    folder: Path,
    run: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run's folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    for name, lines in (("metrics", rows), ("samples", samples), ("pairs", pairs)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder
