"""What a row is remembered by, and a data set with reference log-probs of which only the missing ones are computed.

The pass itself belongs to the trainer, which knows devices and ranks:

    keys = row_keys(dataset, ld_alpha=objective.ld_alpha)
    for batch in batches_with_keys(dataset.select(missing_rows(cache, keys))):
        remembered(batch)
    remembered.settle()
    dataset = with_reference_logps(dataset, keys, cache)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from prefopt.reference.cache import ReferenceCache
from prefopt.types import PAIR, Branch

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["missing_rows", "row_key", "row_keys", "with_reference_logps"]

REFERENCE_COLUMNS: dict[Branch, str] = {branch: f"ref_{branch}_logps" for branch in PAIR}

NOT_CONTENT = frozenset({"row", "weight", "margin", *REFERENCE_COLUMNS.values()})
"""Columns of a prepared row that do not decide its log-probs."""

STORED_IMAGE = {"bytes", "path"}
"""Keys of an image in a prepared row: the content of a file, or else where it is. It is known by its content."""


def row_keys(rows: Iterable[Mapping[str, Any]], *, ld_alpha: float | None = None) -> list[bytes]:
    """`row_key` of each row."""
    return [row_key(row, ld_alpha=ld_alpha) for row in rows]


def row_key(row: Mapping[str, Any], *, ld_alpha: float | None = None) -> bytes:
    """What is scored, as 16 bytes: the columns of a prepared row that decide its log-probs, and LD-DPO's alpha.

    The columns hold the token ids after truncation, the loss masks and where each prompt starts, so that options that
    change what is scored change the key, and options that do not (learning rate, batch size, order) leave it alone.
    Two rows with equal keys have equal log-probs under one reference.

    Raises:
        TypeError: a column holds something that has no canonical form.
    """
    digest = xxhash.xxh3_128(f"2;{ld_alpha!r}".encode())
    for column in sorted(row.keys() - NOT_CONTENT):
        digest.update(f";{len(column)}:{column}=".encode())
        try:
            digest.update(canonical(row[column]))
        except TypeError as error:
            raise TypeError(
                f"Column {column!r} of row {row.get('row', '?')} holds {error}, of which no key can be made for the "
                "cache of reference log-probs. Remove the column."
            ) from None
    return digest.digest()


def canonical(value: Any) -> bytes:
    """Bytes that equal values share, whether they are lists or arrays; each with its length in front."""
    if isinstance(value, list):  # token ids and masks: of these an array is made in half the time that numpy needs
        try:
            return framed(f"int({len(value)},)", array("q", value).tobytes())
        except (TypeError, OverflowError):
            pass  # no list of whole numbers
    if value is None or isinstance(value, str):
        return framed("text", repr(value).encode())
    if isinstance(value, bytes):
        return framed("bytes", value)
    if isinstance(value, Mapping) and value.keys() == STORED_IMAGE:
        content = value["bytes"]
        return framed("image", Path(value["path"]).read_bytes() if content is None else content)
    if isinstance(value, Mapping):
        return framed("map", b"".join(canonical(key) + canonical(value[key]) for key in sorted(value)))
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of different lengths
        return framed("list", b"".join(canonical(item) for item in value))
    if numbers.size == 0 or numbers.dtype.kind in "biu":
        return framed(f"int{numbers.shape}", numbers.astype("<i8").tobytes())
    if numbers.dtype.kind == "f":
        return framed(f"float{numbers.shape}", numbers.astype("<f8").tobytes())
    if numbers.ndim == 0:
        raise TypeError(type(value).__name__)
    return framed("list", b"".join(canonical(item) for item in value))


def framed(kind: str, content: bytes) -> bytes:
    return f"{kind}:{len(content)}:".encode() + content


def missing_rows(cache: ReferenceCache, keys: Sequence[bytes]) -> list[int]:
    """Indices of the rows to compute: those the cache does not know, equal rows once."""
    first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in cache}
    return sorted(first.values())


def with_reference_logps(dataset: Dataset, keys: Sequence[bytes], cache: ReferenceCache) -> Dataset:
    """``dataset`` with the columns ``ref_chosen_logps`` and ``ref_rejected_logps`` from the cache.

    Raises:
        ValueError: the cache lacks rows (the pass over `missing_rows` did not come before, or not on every rank).
    """
    values = cache.get(keys)
    lacking = [index for index, value in enumerate(values) if value is None]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(keys)} rows have no reference log-probs, the first at index {lacking[0]}. Score "
            "`missing_rows`, and give every rank the others' `pending` entries, before the columns are added."
        )
    dataset = dataset.remove_columns([c for c in REFERENCE_COLUMNS.values() if c in dataset.column_names])
    for branch, column in REFERENCE_COLUMNS.items():
        dataset = dataset.add_column(column, [value[branch] for value in values if value is not None])
    return dataset
