"""A step that is not finite, written down: what it was computed from, what came out, and the steps before it.

``_nonfinite-step-N`` holds two files for each rank. ``rank-R.safetensors`` has the token ids of each pair of the rank,
``<place>/prompt_ids`` and ``<place>/<branch>_ids``, and [P] float64 ``loss``, ``policy/<branch>``,
``reference/<branch>``; ``rank-R.json``, written last, has the rest. JSON has no NaN: it is the text ``"nan"`` there. No
upload to the Hub takes a name with ``_`` in front: text of the data is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from prefopt.data import tokenized_example
from prefopt.files import replace_file
from prefopt.trainer.guards.nonfinite import Finding
from prefopt.types import Branch

__all__ = ["write_dump"]

Decode = Callable[[Sequence[int]], str]


def write_dump(
    folder: Path,
    rank: int,
    finding: Finding,
    rows: Sequence[Mapping[str, Any]],
    branches: Sequence[Branch],
    decode: Decode | None,
    **facts: Any,
) -> None:
    """Write a rank's part of a step.

    Args:
        folder: of the step, for all ranks.
        rank: number of this one.
        finding: of its pairs.
        rows: [P] the prepared rows of its pairs.
        branches: completions of a pair that are computed.
        decode: token ids -> text; None where there is none.
        facts: of the step, JSON-able: its number, the losses, the seed.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [token_ids(row, branches) for row in rows]
    tensors: dict[str, Tensor] = {**finding.columns}
    for place, of_pair in enumerate(ids):
        tensors |= {
            f"{place}/{name}_ids": torch.tensor(list(tokens), dtype=torch.int64) for name, tokens in of_pair.items()
        }
    replace_file(folder / f"rank-{rank}.safetensors", save(tensors))
    pairs = [
        {
            "row": row,
            "guilty": guilty,
            **{name: values[place].item() for name, values in finding.columns.items()},
            "text": None if decode is None else {name: decode(list(tokens)) for name, tokens in ids[place].items()},
        }
        for place, (row, guilty) in enumerate(zip(finding.rows, finding.guilty, strict=True))
    ]
    found = {"weights_not_finite": finding.weights, "gradients_not_finite": finding.gradients, "pairs": pairs}
    content = json.dumps(plain({**facts, "rank": rank, **found}), indent=1, allow_nan=False)
    replace_file(folder / f"rank-{rank}.json", content)


def token_ids(row: Mapping[str, Any], branches: Sequence[Branch]) -> dict[str, Sequence[int]]:
    """``prompt`` and each branch -> its token ids."""
    example = tokenized_example(row, branches)
    return {"prompt": example.prompt_ids, **{branch: example.completion_ids[branch] for branch in branches}}


def plain(value: Any) -> Any:
    """``value`` with every number that JSON does not have as text: ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
