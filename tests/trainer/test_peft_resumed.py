"""Adapters saved, read back and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import PLAIN_RUN, logged_losses
from peft_kinds import KINDS, Kind, assert_trains_as_defined, lora, run_of, several, trained_names, tuner, with_adapter
from short_runs import dataset, trainer, weights
from transformers import TrainerCallback

RESUMED = ("PiSSA", "saved head", "prompt tuning", "p-tuning", "projected prefix", "experts")


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


STEPS = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
ALLOCATED = Kind(
    tuner("AdaLoraConfig", init_r=6, target_r=2, total_step=6, tinit=1, tfinal=2, deltaT=1, lora_alpha=100)
)


@pytest.mark.parametrize("step", [1, 3, 5], ids=["before", "within", "after"])
def test_adalora_goes_on_with_all_ranks(step: int, tmp_path: Path) -> None:
    """Before, within and after the steps in which ranks are allocated; PEFT's file has those that are left."""
    whole = run_of(tmp_path / "whole", ALLOCATED, **STEPS)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = run_of(tmp_path / "resumed", ALLOCATED, **STEPS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    left = whole.model.peft_config["default"].rank_pattern
    assert left == resumed.model.peft_config["default"].rank_pattern
    assert 0 < sum(map(sum, left.values())) < 6 * len(left)
    assert logged_losses(resumed)[step:] == logged_losses(whole)[step:]
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_the_best_ranks_of_adalora_are_read_back(tmp_path: Path) -> None:
    """The first checkpoint, into a model that has given up ranks since."""
    scores, seen = iter(range(6, 0, -1)), AfterSteps()
    run = run_of(
        tmp_path,
        ALLOCATED,
        **STEPS,
        **{"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": dataset(4, seed=6), "callbacks": [seen]},
        **{"compute_metrics": lambda _: {"score": next(scores)}, "metric_for_best_model": "score"},
        **{"load_best_model_at_end": True, "greater_is_better": True},
    )
    run.train()
    assert torch.equal(weights(run.model), seen.weights[0])


def test_an_adapter_of_other_ranks_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, KINDS["LoRA"])
    run_of(tmp_path, Kind(lora(r=2))).save_model()
    with pytest.raises(ValueError, match="of other shapes than this run's"):
        run.load_saved_weights(tmp_path)


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
