"""The columns ``weight`` and ``margin``: into prepared rows, under other names, and what is said of broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from data_helpers import PAIR_OPTIONS, byte_tokenizer
from datasets import Dataset

from prefopt.data import DatasetConfig, DatasetMixtureConfig, get_dataset, prepare_dataset, tokenized_example
from prefopt.data.pair_numbers import pair_numbers
from prefopt.types import PAIR

ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5", "weight": 2, "margin": -0.5},
    {"prompt": "2+2=", "chosen": "4", "rejected": "4", "weight": 7, "margin": 7.0},
    {"prompt": "2+3=", "chosen": "5", "rejected": "6", "weight": 0, "margin": 1.25},
]
"""The second has nothing to learn from."""
COLUMNS = ("weight", "margin")


def prepared(rows: list[dict[str, Any]], *, stream: bool = False) -> list[dict[str, Any]]:
    dataset = Dataset.from_list(rows)
    given = dataset.to_iterable_dataset() if stream else dataset
    return list(prepare_dataset(given, byte_tokenizer(), PAIR_OPTIONS, name="train"))  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("present", [(), ("weight",), ("margin",), COLUMNS], ids="-".join)
def test_the_numbers_stay_with_their_rows(present: tuple[str, ...], stream: bool) -> None:
    """Also where a row between them is skipped."""
    kept = prepared([{k: v for k, v in row.items() if k not in COLUMNS or k in present} for row in ROWS], stream=stream)
    assert [row["row"] for row in kept] == [0, 2]
    for row in kept:
        given = ROWS[row["row"]]
        assert {column: row[column] for column in COLUMNS if column in row} == {c: given[c] for c in present}
        example = tokenized_example(row, PAIR)
        assert example.weight == (given["weight"] if "weight" in present else None)
        assert example.target_margin == (given["margin"] if "margin" in present else None)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_rows_of_token_ids_have_them_too(stream: bool) -> None:
    row = {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8], "weight": 0.25, "margin": 3.0}
    (kept,) = prepared([row], stream=stream)
    assert (kept["weight"], kept["margin"], kept["chosen_ids"]) == (0.25, 3.0, [7])


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("column", "value"),
    [("weight", -0.5), ("weight", None), ("weight", math.nan), ("margin", math.inf), ("margin", None)],
)
def test_a_broken_number_names_row_and_column(column: str, value: Any, stream: bool) -> None:
    rows = [ROWS[0], {**ROWS[0], column: value}]
    message = rf"train data, row 1, column '{column}': expected a finite number.*Give every"
    with pytest.raises(ValueError, match=message):
        prepared(rows, stream=stream)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("value", ["2", True, [1.0]], ids=str)
def test_what_is_no_number_is_an_error(column: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"row 4, column '{column}': expected a finite number.*rename it"):
        pair_numbers({column: value}, 4)


def test_weights_are_not_negative_and_margins_may_be() -> None:
    assert pair_numbers({"weight": 0, "margin": -2}, 0) == {"weight": 0.0, "target_margin": -2.0}
    with pytest.raises(ValueError, match="at least 0, got float -1e-09"):
        pair_numbers({"weight": -1e-9}, 0)


def test_columns_of_a_run_file_may_name_them(tmp_path: Path) -> None:
    """`columns:` maps them from the set's own names."""
    renamed = [{"q": "a", "good": "b", "bad": "c", "confidence": 0.5, "gap": 2.0, "margin": "wide"}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, renamed)))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "weight": "confidence", "margin": "gap"}
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(str(path), columns=columns)])
    rows = list(prepare_dataset(get_dataset(mixture)["train"], byte_tokenizer(), PAIR_OPTIONS, name="train"))
    assert [(row["weight"], row["margin"]) for row in rows] == [(0.5, 2.0)] * 2
