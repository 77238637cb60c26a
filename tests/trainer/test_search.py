"""Hyperparameter search with optuna: what a trial suggests acts, trials are independent, some are pruned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from short_runs import dataset, trainer
from tiny_models import tiny_model

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "cpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
    "tpo": {},
}


def searching(folder: Path, method: str = "dpo", **options: Any) -> Any:
    options = {"model_init": lambda: tiny_model(seed=1), "eval_dataset": dataset(5, seed=3), "max_steps": 2, **options}
    return trainer(folder, method, **options)


def rows_of_trials(run: Any) -> list[list[dict[str, Any]]]:
    """The log of every run of ``train`` from now on."""
    logs: list[list[dict[str, Any]]] = []
    original = run.train

    def train(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            logs.append(run.state.log_history)

    run.train = train
    return logs


def in_turn(name: str, values: list[Any]) -> Any:
    """A search space that tries each value of one option once."""
    return {"hp_space": lambda trial: {name: trial.suggest_categorical(name, values)}, "n_trials": len(values)}


def grid(name: str, values: list[Any]) -> Any:
    return optuna.samplers.GridSampler({name: values}, seed=0)


@pytest.mark.parametrize(("method", "adapter"), [*((method, False) for method in METHODS), ("dpo", True)])
def test_trials_are_independent_runs(method: str, adapter: bool, tmp_path: Path) -> None:
    """Two trials with the same options give the same objective, and it is that of a run without a search."""
    options: dict[str, Any] = dict(METHODS[method])
    if adapter:
        options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    run = searching(tmp_path, method, **options)
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-2, 1e-2)}, n_trials=2
    )
    alone = searching(tmp_path, method, learning_rate=1e-2, **options)
    alone.train()
    assert best.objective == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        ("dpo", "beta", [0.05, 0.5]),
        ("dpo", "loss_type", ["ipo", "hinge"]),
        ("dpo", "ld_alpha", [0.0, 1.0]),
        ("cpo", "simpo_gamma", [0.1, 2.0]),
        ("cpo", "loss_type", ["sigmoid", "simpo"]),
        ("tpo", "tpo_alpha", [0.1, 2.0]),
    ],
)
def test_options_of_the_loss_act(method: str, name: str, values: list[Any], tmp_path: Path) -> None:
    """The objective of each trial is that of a run whose config has the value from the start."""
    run = searching(tmp_path, method, **METHODS[method])
    losses = []
    run.hyperparameter_search(
        **in_turn(name, values),
        compute_objective=lambda metrics: losses.append(metrics["eval_loss"]) or metrics["eval_loss"],
        sampler=grid(name, values),
    )
    expected = []
    for value in values:
        alone = searching(tmp_path, method, **{**METHODS[method], name: value})
        alone.train()
        expected.append(alone.evaluate()["eval_loss"])
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_options_assigned_between_two_runs_act(tmp_path: Path) -> None:
    """As users do with the best trial's options; without ``model_init`` too."""
    for by_init in (True, False):
        make = searching if by_init else trainer
        run = make(tmp_path, learning_rate=0.0, max_steps=1, loss_type="ipo")
        run.train()
        run.args.beta, run.args.ld_alpha = 0.5, 0.2
        run.train()
        # ipo at a margin of 0 is 1 / (2 beta)^2
        assert run.state.log_history[0]["loss"] == pytest.approx(1.0, abs=1e-4)
        run.args.beta = -1.0
        with pytest.raises(ValueError, match=r"beta=-1\.0"):
            run.train()


def test_the_reference_follows_as_the_trial_says(tmp_path: Path) -> None:
    """alpha 1 makes the reference the policy before every later step, so the loss stays ln 2; 0 leaves it."""
    run = searching(tmp_path, sync_ref_model=True, ref_model_sync_steps=1, max_steps=3)
    logs = rows_of_trials(run)
    run.hyperparameter_search(
        **in_turn("ref_model_mixup_alpha", [0.0, 1.0]), sampler=grid("ref_model_mixup_alpha", [0.0, 1.0])
    )
    last = sorted(rows[2]["loss"] for rows in logs)
    assert last[1] == pytest.approx(math.log(2), abs=1e-6)
    assert last[0] < math.log(2) - 1e-3


def test_a_study_prunes(tmp_path: Path) -> None:
    """The second trial, with a learning rate of 0, is worse at its first evaluation; the third runs to its end."""
    rates = iter([1e-2, 0.0, 1e-2])
    run = searching(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=3)
    logs = rows_of_trials(run)
    studies = []

    def space(trial: Any) -> dict[str, float]:
        studies.append(trial.study)
        if "rate" not in trial.user_attrs:
            trial.set_user_attr("rate", next(rates))
        return {"learning_rate": trial.user_attrs["rate"]}

    best = run.hyperparameter_search(
        hp_space=space, n_trials=3, pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    )
    states = [trial.state.name for trial in studies[-1].trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE"]
    steps = [max(row["step"] for row in rows) for rows in logs]
    assert steps[0] == steps[2] == 3
    assert steps[1] < 3
    assert best.objective < math.log(2)
    assert not run.is_in_train
    values = [trial.value for trial in studies[-1].trials]
    assert values[0] == pytest.approx(values[2], rel=1e-6), "nothing is left of the trial that was pruned"


@pytest.mark.parametrize(("metric", "direction"), [("rewards/margins", "maximize"), (None, "minimize")])
def test_the_objective_is_one_metric(metric: str | None, direction: str, tmp_path: Path) -> None:
    run = searching(tmp_path, metric_for_best_model=metric, max_steps=3)
    logs = rows_of_trials(run)
    trials = []

    def space(trial: Any) -> dict[str, float]:
        trials.append(trial)
        return {"learning_rate": trial.suggest_categorical("learning_rate", [0.0, 1e-2])}

    best = run.hyperparameter_search(space, n_trials=2, sampler=grid("learning_rate", [0.0, 1e-2]))
    assert trials[0].study.direction.name.lower() == direction
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert len(logs) == 2


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    run = searching(tmp_path, metric_for_best_model="margins")
    with pytest.raises(ValueError, match="'eval_margins', and the evaluation gave epoch, eval_entropy"):
        run.hyperparameter_search(lambda trial: {}, n_trials=1)


def test_options_whose_work_is_done_are_refused(tmp_path: Path) -> None:
    run = searching(tmp_path)
    with pytest.raises(ValueError, match="suggests max_length, which"):
        run.hyperparameter_search(**in_turn("max_length", [8, 16]))
    run = searching(tmp_path, "tpo", tpo_alpha=0.0)
    with pytest.raises(ValueError, match="tpo_alpha was 0 when the rows were prepared"):
        run.hyperparameter_search(**in_turn("tpo_alpha", [1.0]))


def test_a_model_that_depends_on_the_trial(tmp_path: Path) -> None:
    """Precomputed log-probs are those of the trial's own start, not of an earlier trial's."""
    seeds = iter([1, 2, 1, 2, 1, 2])
    run = searching(tmp_path, model_init=lambda: tiny_model(seed=next(seeds)), precompute_ref_log_probs=True)
    logs = rows_of_trials(run)
    run.hyperparameter_search(lambda trial: {}, n_trials=2)
    for rows in logs:
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[0][0]["logps/chosen"] != logs[1][0]["logps/chosen"]
    assert not torch.equal(tiny_model(seed=1).lm_head.weight, tiny_model(seed=2).lm_head.weight)
