"""Adapters saved, read back and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import PLAIN_RUN, logged_losses
from peft_kinds import KINDS, assert_trains_as_defined, lora, run_of, several, trained_names, with_adapter
from runs import dataset, trainer, weights
from transformers import TrainerCallback

RESUMED = ("PiSSA", "saved head", "AdaLoRA", "prompt tuning", "p-tuning", "projected prefix", "experts")


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_changes_nothing(name: str, tmp_path: Path) -> None:
    """Also of p-tuning, of which PEFT saves the virtual tokens and not what makes them."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    whole = run_of(tmp_path / "whole", KINDS[name], **options)
    whole.train()
    resumed = run_of(tmp_path / "resumed", KINDS[name], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert logged_losses(resumed) == logged_losses(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


GIVEN: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "another name": (lambda: {"model": with_adapter("mine")}, {}),
    "several": (lambda: {"model": several()}, {}),
    "one of several": (lambda: {"model": several()}, {"model_adapter_name": "first"}),
    "stacked": (lambda: {"model": with_adapter(), "peft_config": lora(target_modules=["v_proj"])()}, {}),
    "stacked on another name": (lambda: {"model": with_adapter("mine"), "peft_config": lora(r=2)()}, {}),
}
"""PeftModels as users bring them: arguments of the trainer, and options of the config."""


@pytest.mark.parametrize("case", GIVEN)
def test_a_given_adapter_trains_and_resumes(case: str, tmp_path: Path) -> None:
    """Resumed, the adapters that were active are active and those that were trained are trained."""
    arguments, options = GIVEN[case]
    assert_trains_as_defined(trainer(tmp_path, **arguments(), **PLAIN_RUN, **options))
    options = {**PLAIN_RUN, **options, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "whole", **arguments(), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **arguments(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert logged_losses(resumed) == logged_losses(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.model.active_adapters == whole.model.active_adapters
    assert trained_names(resumed.model) == trained_names(whole.model)


@pytest.mark.parametrize("case", ["another name", "stacked"])
def test_the_best_checkpoint_is_read_back(case: str, tmp_path: Path) -> None:
    """The first one; transformers would look for an adapter called ``default``, or read the first of several."""
    scores, seen = iter((2.0, 1.0)), AfterSteps()
    options = {**PLAIN_RUN, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tmp_path,
        **GIVEN[case][0](),
        **options,
        eval_dataset=dataset(4, seed=6),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[seen],
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert not torch.equal(seen.weights[1], seen.weights[0])
    assert torch.equal(weights(run.model), seen.weights[0])


class AfterSteps(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights(kwargs["model"]))
