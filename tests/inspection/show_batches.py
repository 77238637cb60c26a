"""Which tokens a trainer's batches score, and which ones `show` calls trained: in one form, to be compared."""

from __future__ import annotations

from typing import Any

import torch

Tokens = tuple[list[int], list[bool]]
"""Ids of a sequence, and which of them are scored."""


def in_batches(run: Any) -> dict[tuple[int, str], Tokens]:
    """Row and branch -> the sequence in the loader's batches, and which of its tokens are targets."""
    found: dict[tuple[int, str], Tokens] = {}
    for step in run.get_train_dataloader():
        for batch in step.micro_batches:
            ids, mask = batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"].bool()
            scored = torch.zeros_like(ids, dtype=torch.bool)
            scored.view(-1)[batch.predict_from + 1] = True
            assert torch.equal(ids.reshape(-1)[batch.predict_from + 1], batch.targets)
            for place, branch in enumerate(batch.layout.branches):
                for pair, row in enumerate(batch.rows):
                    if batch.pair_weights[pair]:
                        sequence = place * batch.layout.num_pairs + pair
                        kept = mask[sequence]
                        found[row, branch] = ids[sequence][kept].tolist(), scored[sequence][kept].tolist()
    return found


def in_previews(previews: Any) -> dict[tuple[int, str], Tokens]:
    """The same of what is shown, without the tokens that were cut."""
    found: dict[tuple[int, str], Tokens] = {}
    for preview in previews:
        assert preview.problem is None
        for branch, sequences in preview.branches.items() if preview.skipped is None else ():
            kept = [piece for piece in (*sequences.prompt, *sequences.completion) if piece.kind != "cut"]
            tokens = [(index, piece.kind == "trained") for piece in kept for index in piece.ids]
            found[preview.row, branch] = [index for index, _ in tokens], [trained for _, trained in tokens]
    return found
