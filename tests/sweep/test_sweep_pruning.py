"""Who is given up: successive halving by hand, whatever the order of turns; the user's own wishes are respected."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_runs import dataset, trainer
from sweeps import METRIC, sweep_of, trial

from prefopt.sweep.pruning import OF_EVALUATION, Pruning, metric_problems, pruned, read_pruning
from prefopt.sweep.state import Status, Sweep

ASHA = Pruning("asha", min_steps=10, reduction_factor=2)
Values = dict[str, dict[int, float]]


def at_step_10(values: list[float], direction: str = "maximize") -> tuple[Sweep, Values]:
    names = [f"{place:02d}" for place in range(len(values))]
    sweep = sweep_of([trial(name, last=value) for name, value in zip(names, values, strict=True)], direction)
    return sweep, {name: {5: 0.0, 10: value} for name, value in zip(names, values, strict=True)}


def the_better_part(values: list[float], share: int, sign: int = 1) -> set[str]:
    """By definition: the best of every ``share`` trials, and all that are level with the last of them; one at least."""
    ordered = sorted((sign * value for value in values), reverse=True)
    bound = ordered[max(1, len(values) // share) - 1]
    return {f"{place:02d}" for place, value in enumerate(values) if sign * value >= bound}


@pytest.mark.parametrize("share", [2, 3, 4])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("num_trials", [2, 3, 8, 13])
def test_the_better_part_goes_on(share: int, direction: str, num_trials: int) -> None:
    draw = random.Random(share * num_trials)
    values = [draw.choice([0.5, 0.55, 0.6, 0.7, 0.72, 0.8]) for _ in range(num_trials)]
    sweep, reached = at_step_10(values, direction)
    given_up = pruned(replace(ASHA, reduction_factor=share), sweep, reached)
    kept = the_better_part(values, share, 1 if direction == "maximize" else -1)
    assert set(given_up) == set(reached) - kept


def test_before_the_first_rung_nobody_is_given_up() -> None:
    sweep, reached = at_step_10([0.1, 0.9, 0.5, 0.6])
    assert pruned(replace(ASHA, min_steps=11), sweep, reached) == {}
    assert set(pruned(replace(ASHA, min_steps=None), sweep, reached)) == {"00", "02"}, "a quarter of 40 steps"


def test_the_order_of_trials_decides_nothing() -> None:
    values = [0.5, 0.9, 0.7, 0.3, 0.6, 0.8]
    sweep, reached = at_step_10(values)
    for seed in range(5):
        trials = random.Random(seed).sample(sweep.trials, len(values))
        assert set(pruned(ASHA, replace(sweep, trials=tuple(trials)), reached)) == {"00", "03", "04"}


def test_rungs_follow_each_other() -> None:
    """Four reached step 10 and two of them step 20; of these one goes on, and is compared with these alone."""
    sweep, reached = at_step_10([0.5, 0.6, 0.7, 0.8])
    over = {"00": Status.PRUNED, "01": Status.PRUNED}
    sweep = replace(sweep, trials=tuple(replace(t, status=over.get(t.name, t.status)) for t in sweep.trials))
    assert pruned(ASHA, sweep, reached) == {}
    reached["02"] |= {15: 0.1, 20: 0.85}
    reached["03"] |= {15: 0.9, 20: 0.81}
    reasons = pruned(ASHA, sweep, reached)
    assert reasons == {"03": f"asha: {METRIC} was 0.81 at step 20"}


def test_a_trial_that_comes_later_is_compared_with_all_before() -> None:
    sweep, reached = at_step_10([0.5, 0.6, 0.7, 0.8, 0.55])
    done = {"00": Status.PRUNED, "01": Status.PRUNED, "02": Status.FAILED, "03": Status.FINISHED}
    sweep = replace(sweep, trials=tuple(replace(t, status=done.get(t.name, t.status)) for t in sweep.trials))
    assert set(pruned(ASHA, sweep, reached)) == {"04"}
    reached["04"][10] = 0.75
    assert pruned(ASHA, sweep, reached) == {}


def test_clones_and_resumed_trials_are_the_users_own() -> None:
    """A clone that began at step 10 has its original's rows; it is not given up, and takes nobody's place."""
    sweep, reached = at_step_10([0.5, 0.6, 0.7, 0.8, 0.9, 0.1])
    own: dict[str, dict[str, Any]] = {"04": {"cloned_from": "03", "clone_step": 5}, "05": {"spared": True}}
    sweep = replace(sweep, trials=tuple(replace(t, **own.get(t.name, {})) for t in sweep.trials))
    assert set(pruned(ASHA, sweep, reached)) == {"00", "01"}


def test_the_median_is_of_those_that_have_finished() -> None:
    rule = Pruning("median", min_steps=10, startup_trials=3)
    sweep, reached = at_step_10([0.5, 0.6, 0.7, 0.59, 0.61])
    assert pruned(rule, sweep, reached) == {}, "nobody has finished"
    trials = [replace(t, status=Status.FINISHED) if t.name in ("00", "01", "02") else t for t in sweep.trials]
    assert set(pruned(rule, replace(sweep, trials=tuple(trials)), reached)) == {"03"}


def test_hyperband_halves_within_its_brackets() -> None:
    values = [place / 100 for place in range(24)]
    sweep, reached = at_step_10(values)
    given_up = pruned(Pruning("hyperband", min_steps=10), sweep, reached)
    assert 4 <= len(given_up) < 20, "some brackets have their first rung later"
    assert "23" not in given_up
    assert pruned(Pruning("hyperband", min_steps=10), sweep, reached) == given_up


def test_nothing_is_asked_before_anything_is_known() -> None:
    assert pruned(ASHA, sweep_of([trial("00", Status.WAITING, max_steps=None)]), {}) == {}
    assert pruned(ASHA, sweep_of([trial("00")]), {"00": {}}) == {}


# -- what the user wrote -----------------------------------------------------------------------------------------------


def test_pruning_is_read() -> None:
    assert read_pruning(None) is read_pruning("none") is read_pruning(False) is None
    assert read_pruning("asha") == Pruning("asha")
    assert read_pruning({"method": "median", "min_steps": 5}) == Pruning("median", 5)
    with pytest.raises(ValueError, match="pruning='ashe': must be one of asha, hyperband, median, none"):
        read_pruning("ashe")


def test_an_evaluation_logs_the_metrics_that_are_known(tmp_path: Path) -> None:
    found: set[str] = set()
    for method in ("dpo", "cpo"):
        run = trainer(tmp_path / method, method, eval_dataset=dataset(8, seed=1), max_steps=1)
        found |= {name for name in run.evaluate() if name not in NOT_COMPARED}
    assert found == {f"eval_{name}" for name in OF_EVALUATION} - {"eval_aux_loss"}
    assert metric_problems("eval_rewards/margins", "maximize", "steps", is_needed=True) == []


NOT_COMPARED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "epoch"}
