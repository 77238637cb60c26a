"""Collators under TRL's names: rows with ``prompt_ids``, ``chosen_ids``, .. to padded tensors, and those to a batch.

The trainers build their batches themselves. A collator is for users who pass one: it gives a dictionary of padded
tensors ([chosen..; rejected..; reference..], TRL's keys), which `collated_batch` turns into a `PreferenceBatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin

from prefopt.batching.layout import branch_layout
from prefopt.batching.padded import padded_width
from prefopt.types import COLUMN_OF_BRANCH, PAIR, TRIPLE, Branch, PreferenceBatch

__all__ = ["DataCollatorForPreference", "DataCollatorForTriplePreference", "collated_batch"]

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass
class DataCollatorForPreference(DataCollatorMixin):
    """Pads pairs to ``input_ids``, ``attention_mask`` and ``completion_mask``, each int64 [2 P, T].

    Rows are prompt + chosen for every pair, then prompt + rejected; truncated first, then padded on the right.
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (float32 [P]) are added where the rows have them.

    Args:
        pad_token_id: fills ``input_ids``.
        max_length: tokens kept of each prompt + completion; None keeps all.
        truncation_mode: ``keep_start`` or ``keep_end``.
        pad_to_multiple_of: T is rounded up to a multiple of it.
        return_tensors: only ``"pt"``.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def branches(self) -> tuple[Branch, ...]:
        """The completions of a row, in the order in which they stand in the batch."""
        return PAIR

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``completion_mask`` [B * P, T] of P rows, padded on the right.

        Raises:
            ValueError: ``truncation_mode`` is none.
        """
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"Unsupported truncation mode: {self.truncation_mode!r}. Use one of {', '.join(TRUNCATION_MODES)}."
            )
        rows = [self.row(example, branch) for branch in self.branches() for example in examples]
        width = padded_width(max(len(ids) for ids, _ in rows), self.pad_to_multiple_of)
        output: dict[str, Any] = {
            "input_ids": padded([ids for ids, _ in rows], self.pad_token_id, width),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0, width),
            "completion_mask": padded([mask for _, mask in rows], 0, width),
        }
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            if column in examples[0]:
                output[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return output

    def row(self, example: Mapping[str, Any], branch: Branch) -> tuple[list[int], list[int]]:
        """Token ids and completion mask of one truncated sequence."""
        column = COLUMN_OF_BRANCH[branch]
        start = example.get(f"{column}_prompt_start") or 0
        prompt_ids, completion_ids = list(example["prompt_ids"])[start:], list(example[f"{column}_ids"])
        trained = example.get(f"{column}_mask")
        ids = prompt_ids + completion_ids
        mask = [0] * len(prompt_ids) + [int(t) for t in (trained if trained is not None else [1] * len(completion_ids))]
        if self.max_length is not None:
            kept = (
                slice(None, self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
            )
            ids, mask = ids[kept], mask[kept]
        return ids, mask


@dataclass
class DataCollatorForTriplePreference(DataCollatorForPreference):
    """The same with prompt + reference (the gold completion) as a third block of rows: [3 P, T].

    Args:
        include_reference: False leaves the third block out.
    """

    include_reference: bool = True

    def branches(self) -> tuple[Branch, ...]:
        return TRIPLE if self.include_reference else PAIR


def padded(rows: Iterable[Sequence[int]], value: int, width: int) -> Tensor:
    """[R, width] int64, filled up with ``value`` on the right."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def collated_batch(
    collated: Mapping[str, Any], branches: Sequence[Branch], rows: Sequence[int], *, weight: float = 1.0
) -> PreferenceBatch:
    """The batch in a collator's output.

    Args:
        collated: ``input_ids``, ``attention_mask``, ``completion_mask``, each [B * P, T] and padded on either side; and
            optionally ``ref_chosen_logps``, ``ref_rejected_logps`` [P].
        branches: the completions the rows hold, in the order of the blocks.
        rows: row numbers of the P pairs.
        weight: of every pair; 0 makes a dummy.
    """
    missing = {"input_ids", "attention_mask", "completion_mask"} - set(collated)
    if missing:
        raise ValueError(
            f"The data collator's output lacks {', '.join(sorted(missing))} (it has {', '.join(sorted(collated))}). "
            "Return padded `input_ids`, `attention_mask` and `completion_mask` with all chosen rows first, then all "
            "rejected ones (then all gold ones), or leave `data_collator` out."
        )
    input_ids, attention_mask, completion_mask = (
        torch.as_tensor(collated[key]).cpu() for key in ("input_ids", "attention_mask", "completion_mask")
    )
    if input_ids.shape[0] != len(branches) * len(rows):
        raise ValueError(
            f"The data collator made {input_ids.shape[0]} rows of {len(rows)} pairs; {len(branches)} completions per "
            f"pair ({', '.join(branches)}) are needed, so {len(branches) * len(rows)} rows."
        )
    has_context = attention_mask.cumsum(1) > 1
    row, place = ((completion_mask * attention_mask).bool() & has_context).nonzero(as_tuple=True)
    width = input_ids.shape[1]
    references: dict[Branch, str] = {branch: f"ref_{branch}_logps" for branch in PAIR}
    given = all(key in collated for key in references.values())
    model_inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if not attention_mask[:, 0].all():  # padded on the left: positions start where the tokens do
        model_inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return PreferenceBatch(
        model_inputs=model_inputs,
        predict_from=row * width + place - 1,
        targets=input_ids[row, place],
        layout=branch_layout(torch.bincount(row, minlength=input_ids.shape[0]).tolist(), branches),
        pair_weights=torch.full((len(rows),), weight, dtype=torch.float32),
        rows=tuple(rows),
        num_model_tokens=int(attention_mask.sum()) if weight else 0,
        ref_sum_logps={b: torch.as_tensor(collated[k]).double() for b, k in references.items()} if given else None,
    )
