"""A run that one library began goes on in the other: weights, optimizer, schedule and data order are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_harness import REFERENCE, RELATIVE, build
from tiny_models import tiny_model

pytestmark = pytest.mark.trl


@pytest.mark.parametrize(("first", "second"), [("trl", "prefopt"), ("prefopt", "trl")])
def test_a_checkpoint_goes_on_in_the_other_library(first: str, second: str) -> None:
    """Three steps with AdamW; the checkpoint after the first, the other two elsewhere."""
    config = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
    begun = build(first, "dpo", config, ref_model=tiny_model(**REFERENCE))
    begun.train()
    whole = [row for row in begun.state.log_history if "loss" in row]
    resumed = build(second, "dpo", config, ref_model=tiny_model(**REFERENCE))
    resumed.train(resume_from_checkpoint=str(Path(begun.args.output_dir) / "checkpoint-1"))
    rest = [row for row in resumed.state.log_history if "loss" in row]
    assert [row["step"] for row in rest] == [1, 2, 3]
    for ours, theirs in zip(rest[1:], whole[1:], strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen"):
            assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE, abs=1e-4), key
