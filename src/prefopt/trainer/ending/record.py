"""What a run leaves in its folder while it runs: the rows it has logged, and how it stands.

=================== ==================================================================================
file                what is in it
=================== ==================================================================================
``metrics.jsonl``   a line for each logged row, on the disk before any callback sees it
``run.json``        how the run stands or ended, why, and how to go on
``pairs.jsonl``     the pairs that the model tells apart worst and best (`prefopt.trainer.ending.pairs`)
``curves.png``      drawn from the rows when the run ends (`prefopt.report.curves`)
``report.html``     of all these files, when the run ends (`prefopt.report.run`)
=================== ==================================================================================
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefopt.files import append_line, rename, replace_file
from prefopt.report.folder import read_mapping, read_rows
from prefopt.trainer.saving.masking import without_known_secrets, without_secrets

__all__ = [
    "CURVES",
    "METRICS",
    "NOT_FINITE",
    "RUN",
    "append_row",
    "keep_rows",
    "now",
    "read_mapping",
    "read_rows",
    "reason",
    "rows_until",
    "set_aside",
    "write_run",
]

METRICS, RUN, CURVES = "metrics.jsonl", "run.json", "curves.png"
NOT_FINITE = "not_finite"
"""Key of a row: metric -> ``nan``, ``inf`` or ``-inf``. The number itself is null, as JSON has no such numbers."""
LONGEST = 4000
"""Characters of an exception's message that are kept."""


def now() -> str:
    """The time in UTC, as files have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# -- rows --------------------------------------------------------------------------------------------------------------


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a logged row, with the time, as strict JSON."""
    odd: dict[str, str] = {}
    values = {name: as_json(value, name, odd) for name, value in row.items()}
    whole = {"step": row["step"], "epoch": row.get("epoch"), "time": now()} | values
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(whole | ({NOT_FINITE: odd} if odd else {}), allow_nan=False))


def as_json(value: Any, name: str, odd: dict[str, str]) -> Any:
    """``value`` in JSON's types, however deep; what is neither a number nor a container is text.

    Args:
        value: of Python, numpy or torch.
        name: of the metric; of what lies within, with its keys and places: ``per_class.0``.
        odd: takes the names of numbers that are not finite, which become null.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number):
            return number
        odd[name] = str(number)
        return None
    if isinstance(value, Mapping):
        return {str(key): as_json(item, f"{name}.{key}", odd) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, f"{name}.{place}", odd) for place, item in enumerate(value)]
    if hasattr(value, "tolist") and not isinstance(value, numbers.Complex):
        return as_json(value.tolist(), name, odd)
    return str(value)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only rows that ``keep`` is true of; the file is the old one or the new one at any moment."""
    if path.is_file():
        lines = (json.dumps(row, ensure_ascii=False) for row in read_rows(path) if keep(row))
        replace_file(path, "".join(f"{line}\n" for line in lines))


def rows_until(step: int, num_at_step: int) -> Callable[[dict[str, Any]], bool]:
    """For `keep_rows`: what a run had logged at ``step``, the first ``num_at_step`` rows of that step included."""
    seen = 0

    def keep(row: dict[str, Any]) -> bool:
        nonlocal seen
        seen += row["step"] == step
        return seen <= num_at_step if row["step"] == step else row["step"] < step and not seen

    return keep


def set_aside(path: Path) -> None:
    """Give the file of an earlier run a free name beside it: ``metrics-1.jsonl`` and so on."""
    if path.is_file():
        number = 1
        while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        rename(path, aside)


# -- how a run stands --------------------------------------------------------------------------------------------------


def write_run(path: Path, values: Mapping[str, Any]) -> None:
    """Write how a run stands, without secrets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(without_secrets(dict(values)), indent=1))


def reason(error: BaseException) -> dict[str, Any]:
    """Why a run ended, of the exception that ended it."""
    received = getattr(error, "signal", None)
    known = {"signal": getattr(received, "name", None), "rows": getattr(error, "rows", None)}
    found = {"type": type(error).__name__, "message": without_known_secrets(str(error))[:LONGEST]}
    return found | {name: value for name, value in known.items() if value is not None}
