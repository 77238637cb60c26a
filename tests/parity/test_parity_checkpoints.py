"""A checkpoint of prefopt in TRL: it finds weights, step and place in the data; optimizer and schedule are new.

The other way round: `test_a_checkpoint_of_trl_starts_a_new_run`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_harness import REFERENCE, RELATIVE, build
from tiny_models import tiny_model

pytestmark = pytest.mark.trl


def test_trl_goes_on_from_the_weights_of_a_checkpoint() -> None:
    """Three steps; the checkpoint after the first. TRL's second step has the loss of ours, before any optimizer."""
    config = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
    begun = build("prefopt", "dpo", config, ref_model=tiny_model(**REFERENCE))
    begun.train()
    resumed = build("trl", "dpo", config, ref_model=tiny_model(**REFERENCE))
    resumed.train(resume_from_checkpoint=str(Path(begun.args.output_dir) / "checkpoint-1"))
    (ours, theirs) = ([row for row in run.state.log_history if "loss" in row] for run in (begun, resumed))
    assert [row["step"] for row in theirs] == [1, 2, 3]
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert theirs[1][key] == pytest.approx(ours[1][key], rel=RELATIVE, abs=1e-4), key
