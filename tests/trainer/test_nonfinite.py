"""A NaN never passes for success."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from short_runs import trainer, weights

from prefopt.trainer.guards.nonfinite import NonFiniteStepError


def poisoned(run, at_step: int):
    """The gradient of ``at_step`` (from 1) becomes NaN."""
    original, steps = run.training_step, []

    def step(model, inputs, *rest):
        steps.append(inputs)
        loss = original(model, inputs, *rest)
        if len(steps) == at_step:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    run.training_step = step
    return steps


def test_the_run_stops_before_the_weights_change_and_names_the_rows(tmp_path: Path) -> None:
    good = trainer(tmp_path, max_steps=2, lr_scheduler_type="constant")
    good.train()
    run = trainer(tmp_path, max_steps=6, lr_scheduler_type="constant")
    steps = poisoned(run, 3)
    with pytest.raises(NonFiniteStepError, match=r"Step 3: the gradient norm is nan.*rows \d+") as error:
        run.train()
    assert torch.equal(weights(run.model), weights(good.model))
    assert all(str(row) in str(error.value) for row in steps[2].micro_batches[0].rows)


def test_skip_leaves_the_step_out_and_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, on_nonfinite="skip")
    poisoned(run, 2)
    run.train()
    assert run.state.global_step == 4
    assert torch.isfinite(weights(run.model)).all()


def test_a_nan_weight_is_not_logged_as_a_number(tmp_path: Path) -> None:
    run = trainer(tmp_path, "cpo")
    with torch.no_grad():
        run.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteStepError, match="Step 1: the loss is not finite"):
        run.train()
    assert not any("loss" in row for row in run.state.log_history)
