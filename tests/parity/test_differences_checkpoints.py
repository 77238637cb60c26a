"""What a checkpoint holds, and what of it comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_harness import REFERENCE, Library, build
from short_runs import weights
from tiny_models import tiny_model

pytestmark = pytest.mark.trl

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "optim": "adamw_torch"}


def checkpoint(library: Library, **arguments: Any) -> Path:
    run = build(library, "dpo", SAVED, **arguments)
    run.train()
    return Path(run.args.output_dir, "checkpoint-1")


def test_checkpoints_hold_no_pickle() -> None:
    pickles = {
        library: {path.name for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin")}
        for library in ("trl", "prefopt")
        for folder in [checkpoint(library, ref_model=tiny_model(**REFERENCE))]
    }
    assert pickles["trl"] == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert pickles["prefopt"] == set()


def test_the_weights_of_experts_come_back_on_resume() -> None:
    """On the disk each expert has matrices of its own; TRL finds no place for them, and says so in a warning."""
    for library in ("trl", "prefopt"):
        trained, fresh = (tiny_model("qwen3_moe", seed=seed) for seed in (1, 2))
        folder = checkpoint(library, model=trained, ref_model=tiny_model("qwen3_moe", seed=1))
        run = build(library, "dpo", SAVED, model=fresh, ref_model=tiny_model("qwen3_moe", seed=1))
        run._load_from_checkpoint(str(folder))
        assert torch.equal(weights(fresh), weights(trained)) == (library == "prefopt"), library
