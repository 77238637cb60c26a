"""What the test of sharded heads runs on two gloo ranks: gradients under FSDP2 beside those without it, as JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefopt.batching import pad_batch
from prefopt.scoring.forward import install, score
from prefopt.scoring.head import call
from prefopt.types import PAIR, PreferenceBatch, TokenizedExample

WAYS = ("root", "own", "with the norm")
"""The head in the unit of the whole model, in one of its own, or in one with the norm before it (and with the
embeddings, where these are tied), as accelerate does it."""


def batch(rank: int) -> PreferenceBatch:
    generator = torch.Generator().manual_seed(rank)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(9, 64, (count,), generator=generator).tolist())

    sides = {"chosen": ids(4), "rejected": ids(6)}
    masks = {branch: (True,) * len(side) for branch, side in sides.items()}
    return pad_batch([TokenizedExample(0, ids(5), sides, masks)], PAIR)  # type: ignore[arg-type]


def loss(model: nn.Module, rank: int) -> Tensor:
    logps = score(model, batch(rank)).tokens.logps
    return (logps * torch.linspace(-1, 1, len(logps))).mean()


def shard(model: Any, way: str, tied: bool) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    if way == "own":
        fully_shard(model.lm_head)
    if way == "with the norm":
        unit = [model.model.norm, model.lm_head, *([model.model.embed_tokens] if tied else [])]
        fully_shard(unit, reshard_after_forward=False)
    fully_shard(model)


def difference(way: str, tied: bool) -> float:
    """The greatest between the gradients of two ranks, in their second step, and those of the mean of their losses."""
    model = tiny_model(tie_word_embeddings=tied)
    install(model)
    alone = copy.deepcopy(model)
    for rank in range(2):
        (loss(alone, rank) / 2).backward()
    shard(model, way, tied)
    for _ in range(2):
        model.zero_grad()
        loss(model, dist.get_rank()).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    gradients = [(ours.grad, theirs.grad) for ours, theirs in pairs]
    assert all(isinstance(ours, DTensor) for ours, _ in gradients)
    assert all(theirs.any() for _, theirs in gradients)  # type: ignore[union-attr]
    return max((ours.full_tensor() - theirs).abs().max().item() for ours, theirs in gradients)  # type: ignore[union-attr]


def main(folder: Path) -> None:
    taken = []
    original = call.factored_stats
    call.factored_stats = lambda *args: (taken.append(args), original(*args))[1]
    cases = [(way, tied) for way in WAYS for tied in (False, True) if not (way == "own" and tied)]
    found = {f"{way}, {'tied' if tied else 'untied'}": difference(way, tied) for way, tied in cases}
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(
            json.dumps({"differences": found, "taken": len(taken), "cases": len(cases)})
        )
