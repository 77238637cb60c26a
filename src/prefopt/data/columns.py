"""Prepared rows as columns: which there are, and their Arrow table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from prefopt.data.pair_numbers import PAIR_NUMBERS
from prefopt.data.report import Status
from prefopt.types import COLUMN_OF_BRANCH, RANKS, TRIPLE, Branch, TokenizedExample

__all__ = ["IMAGE_PARTS", "features", "prepared_columns", "prepared_row", "table"]

_FEATURES = {
    "ids": List(Value("int32")),
    "mask": List(Value("bool")),
    "int": Value("int64"),
    "float": Value("float64"),
    "images": List({"bytes": Value("binary"), "path": Value("string")}),
}

IMAGE_PARTS = ("prompt", *TRIPLE, *RANKS[2:])
"""What an image of a prepared row belongs to, by its number in the column ``image_parts``."""


def prepared_columns(
    branches: Sequence[Branch],
    *,
    with_reference: bool = False,
    with_starts: bool = False,
    with_status: bool = False,
    with_images: bool = False,
    numbers: Sequence[str] = (),
) -> dict[str, str]:
    """The columns of a prepared set -> what each holds; ``numbers`` of `PAIR_NUMBERS`."""
    kinds = {"row": "int", "prompt_ids": "ids"}
    for column in (COLUMN_OF_BRANCH[branch] for branch in branches):
        kinds |= {f"{column}_ids": "ids", f"{column}_mask": "mask"}
        kinds |= {f"{column}_prompt_start": "int"} if with_starts else {}
    kinds |= {"ref_chosen_logps": "float", "ref_rejected_logps": "float"} if with_reference else {}
    kinds |= {"images": "images", "image_parts": "ids"} if with_images else {}
    return kinds | dict.fromkeys(numbers, "float") | ({"status": "int"} if with_status else {})


def features(kinds: dict[str, str]) -> Features:
    """The types under which `prepared_columns` are stored."""
    return Features({column: _FEATURES[kind] for column, kind in kinds.items()})


def prepared_row(example: TokenizedExample, status: Status) -> dict[str, Any]:
    """The values of one row, in any column there may be."""
    row: dict[str, Any] = {"row": example.row, "prompt_ids": example.prompt_ids, "status": int(status)}
    for branch, ids in example.completion_ids.items():
        column = COLUMN_OF_BRANCH[branch]
        row[f"{column}_ids"] = ids
        row[f"{column}_mask"] = example.loss_masks[branch]
        row[f"{column}_prompt_start"] = example.prompt_starts.get(branch, 0)
    for branch, value in (example.ref_sum_logps or {}).items():
        row[f"ref_{branch}_logps"] = value
    for column, name in PAIR_NUMBERS.items():
        row[column] = getattr(example, name)
    row["images"] = [image.stored for part in IMAGE_PARTS for image in example.images.get(part, ())]
    row["image_parts"] = [number for number, part in enumerate(IMAGE_PARTS) for _ in example.images.get(part, ())]
    return row


def table(rows: Sequence[dict[str, Any]], kinds: dict[str, str]) -> pa.Table:
    """The columns ``kinds`` of prepared rows as an Arrow table."""
    return pa.table({column: _BUILDERS[kind]([row[column] for row in rows]) for column, kind in kinds.items()})


def _lists(as_array: Callable[[Sequence[int]], np.ndarray], values: Sequence[Sequence[int]]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate([as_array(value) for value in values]) if len(values) else as_array(())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _ids(value: Sequence[int]) -> np.ndarray:
    return np.asarray(value, dtype=np.int32)


def _mask(value: Sequence[int]) -> np.ndarray:
    # All true, as nearly every mask is: numpy needs ten times as long for a list of them
    return np.ones(len(value), dtype=bool) if all(value) else np.asarray(value, dtype=bool)


_BUILDERS: dict[str, Callable[[Any], pa.Array]] = {
    "ids": lambda values: _lists(_ids, values),
    "mask": lambda values: _lists(_mask, values),
    "int": lambda values: pa.array(values, pa.int64()),
    "float": lambda values: pa.array(values, pa.float64()),
    "images": lambda values: pa.array(values, pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))),
}
