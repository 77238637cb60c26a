"""The collators under TRL's names: arguments, keys, tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from prefopt import DataCollatorForPreference, DataCollatorForTriplePreference

PAIR_ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [21, 22], "chosen_ids": [31], "rejected_ids": [41, 42, 43]},
    {"prompt_ids": [23, 24, 25, 26], "chosen_ids": [32, 33], "rejected_ids": [44]},
]
TRIPLE_ROWS = [row | {"reference_ids": [51 + index, 52]} for index, row in enumerate(PAIR_ROWS)]
KEYS = {"input_ids", "attention_mask", "completion_mask"}


def assert_is(tensor: torch.Tensor, values: list[Any], dtype: torch.dtype = torch.int64) -> None:
    assert tensor.dtype == dtype
    assert tensor.tolist() == values


def test_a_pair_batch() -> None:
    """All chosen sequences, then all rejected ones, padded on the right to the longest of both."""
    batch = DataCollatorForPreference(pad_token_id=9)(PAIR_ROWS)
    assert set(batch) == KEYS
    assert_is(
        batch["input_ids"],
        [[21, 22, 31, 9, 9, 9], [23, 24, 25, 26, 32, 33], [21, 22, 41, 42, 43, 9], [23, 24, 25, 26, 44, 9]],
    )
    assert_is(
        batch["attention_mask"],
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]],
    )
    assert_is(
        batch["completion_mask"],
        [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]],
    )


def test_a_triple_batch() -> None:
    """The gold completions follow as a third block, unless they are left out."""
    whole = DataCollatorForTriplePreference(pad_token_id=0)(TRIPLE_ROWS)
    assert set(whole) == KEYS
    assert whole["input_ids"].shape == (6, 6)
    assert whole["input_ids"][4:].tolist() == [[21, 22, 51, 52, 0, 0], [23, 24, 25, 26, 52, 52]]
    assert whole["completion_mask"][4:].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    pairs = DataCollatorForTriplePreference(pad_token_id=0, include_reference=False)(TRIPLE_ROWS)
    for key, tensor in DataCollatorForPreference(pad_token_id=0)(PAIR_ROWS).items():
        assert_is(pairs[key], tensor.tolist())


@pytest.mark.parametrize("collator", [DataCollatorForPreference, DataCollatorForTriplePreference])
def test_width_in_multiples(collator: type) -> None:
    batch = collator(pad_token_id=0, pad_to_multiple_of=8)(TRIPLE_ROWS)
    assert {tensor.shape[1] for tensor in batch.values()} == {8}
    assert batch["attention_mask"].sum() == collator(pad_token_id=0)(TRIPLE_ROWS)["attention_mask"].sum()


@pytest.mark.parametrize(
    ("mode", "chosen", "rejected"),
    [
        ("keep_start", [[21, 22, 31, 0], [23, 24, 25, 26]], [[21, 22, 41, 42], [23, 24, 25, 26]]),
        ("keep_end", [[21, 22, 31, 0], [25, 26, 32, 33]], [[22, 41, 42, 43], [24, 25, 26, 44]]),
    ],
)
def test_each_sequence_is_cut_before_padding(mode: str, chosen: list[Any], rejected: list[Any]) -> None:
    batch = DataCollatorForPreference(pad_token_id=0, max_length=4, truncation_mode=mode)(PAIR_ROWS)
    assert batch["input_ids"].tolist() == chosen + rejected
    assert batch["completion_mask"].shape == (4, 4)


def test_an_unknown_way_of_cutting() -> None:
    collator = DataCollatorForPreference(pad_token_id=0, max_length=4, truncation_mode="keep_middle")
    with pytest.raises(ValueError, match="truncation mode"):
        collator(PAIR_ROWS)


def test_reference_log_probs_pass_through() -> None:
    rows = [row | {"ref_chosen_logps": -1.5 - i, "ref_rejected_logps": -4.0} for i, row in enumerate(PAIR_ROWS)]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert set(batch) == KEYS | {"ref_chosen_logps", "ref_rejected_logps"}
    assert_is(batch["ref_chosen_logps"], [-1.5, -2.5], torch.float32)
    assert_is(batch["ref_rejected_logps"], [-4.0, -4.0], torch.float32)


def test_arguments_are_trls_in_trls_order() -> None:
    names = ["pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"]
    assert [field.name for field in dataclasses.fields(DataCollatorForPreference)][:5] == names
    triple = [field.name for field in dataclasses.fields(DataCollatorForTriplePreference)]
    assert triple[:6] == [*names, "include_reference"]


def test_a_subclass_overrides_torch_call() -> None:
    """The usual way to carry a column along."""

    class WithRows(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            return super().torch_call(examples) | {"count": len(examples)}

    assert WithRows(pad_token_id=0)(PAIR_ROWS)["count"] == 2
