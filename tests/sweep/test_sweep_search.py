"""What a sweep tries: ranges as users write them, proposals that depend on the sweep's state alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import MAX_STEPS, METRIC, Formula, sweep_of

import prefopt.sweep.scheduler as scheduler
from prefopt.sweep.pruning import Pruning
from prefopt.sweep.search import Search, read_search, suggest
from prefopt.sweep.space import Range, choices, corners, grid, read_parameter
from prefopt.sweep.state import Status, Sweep, Trial, read_sweep
from prefopt.sweep.strategy import Strategy, given_up, next_options, read_strategy, whole_grid

SPACE: dict[str, Any] = {
    "learning_rate": Range(1e-6, 1e-3, log=True),
    "lora_r": Range(4, 32, step=4),
    "loss_type": [["sigmoid"], ["sigmoid", "sft"]],
    "beta": [0.1, 0.5],
}


def searched(search: Search, value: Any, space: Mapping[str, Any] = SPACE) -> Sweep:
    """All trials of a search, each finished before the next one is proposed."""
    sweep, values = sweep_of([]), {}
    while (options := suggest(search, space, sweep, values)) is not None:
        name, reached = f"{len(sweep.trials):02d}", value(options)
        sweep = sweep.with_trial(Trial(name, options, Status.FINISHED, last=reached))
        values[name] = {10: reached}
    return sweep


# -- what the user wrote -----------------------------------------------------------------------------------------------


def test_ranges_are_read() -> None:
    assert read_parameter("beta", [0.1, 0.5]) == [0.1, 0.5]
    assert read_parameter("beta", {"values": [0.1]}) == [0.1]
    rate = read_parameter("learning_rate", {"low": "1e-6", "high": 1e-4, "log": True})
    assert rate == Range(1e-6, 1e-4, log=True), "1e-6 without a point is text to YAML"
    assert choices(Range(0.1, 0.3, step=0.1)) == [0.1, 0.2, 0.3]
    assert choices(Range(4, 9, step=2)) == [4, 6, 8]
    assert choices(Range(4, 6)) == [4, 5, 6]
    assert choices(Range(0.1, 0.3)) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "an empty list"),
        (0.1, "wants a list of values, or"),
        ({"low": 1}, "wants a list of values, or"),
        ({"low": 1, "high": 2, "scale": "log"}, "wants a list of values, or"),
        ({"low": 2, "high": 1}, "low=2 must be less than high=1"),
        ({"low": 0, "high": 1.0, "log": True}, "a low above 0"),
        ({"low": 1e-5, "high": 1.0, "log": True, "step": 0.1}, "exclude each other"),
        ({"low": 1, "high": 5, "step": 0}, "step must be positive"),
        ({"low": "small", "high": 1}, "'small' is no number"),
        ({"low": 0, "high": math.inf}, "is not finite"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_range_that_is_none_is_refused(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"beta: .*{says}"):
        read_parameter("beta", value)


def test_every_mistake_comes_at_once() -> None:
    values = {
        "parameters": {"beta": {"low": 2, "high": 1}, "learning_rate": {"low": 1e-6, "high": 1e-4}},
        "search": "grid",
        "num_trials": 0,
        "pruning": {"method": "asha", "min_step": 5, "reduction_factor": 1},
        "metric": "eval_reward/accuracies",
        "direction": "up",
    }
    with pytest.raises(ValueError) as caught:
        read_strategy(values, eval_strategy="no")
    for says in (
        "beta: low=2",
        "search=grid: learning_rate has no steps",
        "num_trials=0",
        "unknown key 'min_step'",
        "reduction_factor=1",
        "did you mean 'eval_rewards/accuracies'?",
        "direction='up'",
        "eval_strategy=no nothing is evaluated",
    ):
        assert says in str(caught.value)


def test_defaults_of_a_strategy() -> None:
    plain = read_strategy({"parameters": {"beta": [0.1, 0.5], "lora_r": {"low": 4, "high": 6}}}, "no")
    assert plain.is_grid
    assert plain.pruning is None
    assert (plain.metric, plain.direction) == (METRIC, "maximize")
    assert len(whole_grid(plain, 6)) == 6
    with pytest.raises(ValueError, match="more than max_trials=5 combinations"):
        whole_grid(plain, 5)
    found = read_strategy(
        {"parameters": {"beta": {"low": 0.1, "high": 1.0}}, "num_trials": 3, "metric": "eval_loss", "pruning": "asha"},
        "steps",
    )
    assert (found.search.method, found.direction, found.pruning) == ("tpe", "minimize", Pruning("asha"))


def test_optuna_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    values: dict[str, Any] = {"parameters": {"beta": [0.1, 0.5]}}
    assert read_strategy(values, "steps").is_grid, "a grid needs none"
    for key, what in (("pruning", "asha"), ("search", "random")):
        with pytest.raises(ValueError, match=r"pip install 'prefopt\[sweep\]'"):
            read_strategy({**values, key: what, "num_trials": 2}, "steps")


# -- proposals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_proposals_are_within_the_space_and_never_the_same(method: str) -> None:
    sweep = searched(Search(method, 24, startup_trials=5), lambda options: options["lora_r"] / 100)
    assert len(sweep.trials) == 24
    assert len({repr(trial.options) for trial in sweep.trials}) == 24
    for trial in sweep.trials:
        assert list(trial.options) == list(SPACE)
        assert 1e-6 <= trial.options["learning_rate"] <= 1e-3
        assert trial.options["lora_r"] in range(4, 33, 4)
        assert trial.options["loss_type"] in SPACE["loss_type"], "lists come back as lists"
    whole = searched(Search("grid", None), lambda options: 0.0, {"beta": [0.1, 0.5], "lora_r": Range(4, 8, step=4)})
    assert [trial.options for trial in whole.trials] == [
        {"beta": beta, "lora_r": rank} for beta in (0.1, 0.5) for rank in (4, 8)
    ]


def test_a_small_space_comes_to_its_end() -> None:
    small = {"beta": [0.1, 0.5], "use_dora": [True, False]}
    sweep = searched(Search("random", 50), lambda options: options["beta"], small)
    assert sorted(map(repr, grid(small))) == sorted(repr(trial.options) for trial in sweep.trials)


def test_seeds_decide() -> None:
    def first(seed: int) -> Any:
        return suggest(Search("tpe", 4, seed), SPACE, sweep_of([]), {})

    assert first(0) == first(0) != first(1)


def test_tpe_learns_where_the_best_is() -> None:
    """The metric falls with the distance from 3e-5. Drawn at random, the exponent lies 0.75 away on average: of an
    interval of 3, the best is 1.48 from one end and 1.52 from the other, and (1.48^2 + 1.52^2) / 2 / 3 = 0.75."""

    def distance(options: Mapping[str, Any]) -> float:
        return abs(math.log10(options["learning_rate"]) - math.log10(3e-5))

    space = {"learning_rate": SPACE["learning_rate"]}
    trials = searched(Search("tpe", 40, startup_trials=10), lambda options: -distance(options), space).trials
    late = [distance(trial.options) for trial in trials[-20:]]
    assert sum(late) / len(late) < 0.75 / 2


def test_what_ended_badly_teaches_nothing_and_clones_do_not_count() -> None:
    search = Search("tpe", 3, startup_trials=1)
    first = Trial("1", suggest(search, SPACE, sweep_of([]), {}) or {}, Status.FINISHED, last=0.5)
    failed = Trial("2", {**first.options, "lora_r": 32}, Status.FAILED)
    clone = replace(first, name="3", cloned_from="1", options={"seed": 3})
    with_clone = suggest(search, SPACE, sweep_of([first, failed, clone]), {})
    assert with_clone == suggest(search, SPACE, sweep_of([first, failed]), {})
    assert with_clone is not None
    assert suggest(search, SPACE, sweep_of([first, failed, replace(first, name="4")]), {}) is None, "three of three"


def test_a_space_may_change_on_the_way() -> None:
    search = Search("tpe", 9, startup_trials=1)
    old = Trial("1", {"beta": 0.1}, Status.FINISHED, last=0.5)
    assert suggest(search, {"beta": [0.5], "lora_r": [4]}, sweep_of([old]), {}) == {"beta": 0.5, "lora_r": 4}


def test_both_ends_of_a_range_are_checked_beforehand() -> None:
    found = corners(SPACE)
    assert {options["learning_rate"] for options in found} == {1e-6, 1e-3}
    assert {repr(options["loss_type"]) for options in found} == {repr(value) for value in SPACE["loss_type"]}


# -- a whole sweep -----------------------------------------------------------------------------------------------------


def whole(folder: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> Sweep:
    """A search with pruning over 8 trials, 4 at a time, that may die in a chunk and is started again then."""

    def value(options: Mapping[str, Any], step: int) -> float:
        best = 1.0 - abs(math.log10(options["learning_rate"]) + 4.5) / 3
        return 0.5 + 0.5 * best * step / MAX_STEPS

    pruning, search = Pruning("asha"), Search("tpe", 8, startup_trials=3)
    strategy = Strategy({"learning_rate": SPACE["learning_rate"]}, search, pruning, METRIC, "maximize")

    def next_trial(sweep: Sweep) -> Trial | None:
        options = next_options(strategy, folder, sweep)
        return None if options is None else Trial(f"{len(sweep.trials):02d}", options)

    hooks = scheduler.Hooks(prune=lambda sweep: given_up(strategy, folder, sweep), suggest=next_trial)
    folder.mkdir(exist_ok=True)
    formula = Formula(value, dies_at)
    formula.folder = folder
    monkeypatch.setattr(scheduler, "train_chunk", formula.train_chunk)
    monkeypatch.setattr(scheduler, "free", lambda: None)  # a search for garbage, which there is none of
    monkeypatch.setattr(scheduler, "newest_checkpoint", lambda run: read_sweep(folder).trial(run.name).steps)  # type: ignore[union-attr]
    sweep = read_sweep(folder) or sweep_of([])
    try:
        return scheduler.run_sweep(folder, sweep, formula.make, hooks, max_at_once=4)
    except SystemExit:
        return whole(folder, monkeypatch)


def test_a_sweep_that_was_killed_tries_and_gives_up_what_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = whole(tmp_path / "one", monkeypatch)
    statuses = [trial.status for trial in one.trials]
    assert len(statuses) == 8
    assert set(statuses) == {Status.PRUNED, Status.FINISHED}
    best = max(one.trials, key=lambda trial: trial.last or 0.0)
    assert best.status is Status.FINISHED
    for dies_at in (2, 13):
        killed = whole(tmp_path / f"killed{dies_at}", monkeypatch, dies_at)
        assert [(t.name, t.options, t.status, t.steps, t.last) for t in killed.trials] == [
            (t.name, t.options, t.status, t.steps, t.last) for t in one.trials
        ]


def test_a_metric_that_nobody_logs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="have not logged it; they have eval_rewards/accuracies"):
        whole_with_metric(tmp_path, monkeypatch, "eval_nll_loss")


def whole_with_metric(folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    strategy = Strategy({"beta": [0.1]}, read_search("grid", None, {}), Pruning("asha"), metric, "minimize")
    formula = Formula(lambda options, step: 0.5)
    formula.folder = folder
    monkeypatch.setattr(scheduler, "train_chunk", formula.train_chunk)
    monkeypatch.setattr(scheduler, "free", lambda: None)  # a search for garbage, which there is none of
    hooks = scheduler.Hooks(prune=lambda sweep: given_up(strategy, folder, sweep))
    sweep = replace(sweep_of([Trial("one", {"beta": 0.1})]), metric=metric)
    scheduler.run_sweep(folder, sweep, formula.make, hooks, max_at_once=4)
