"""What is said of rows whose story is known: made by hand, with the noise of small batches."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from prefopt.objective import ObjectiveOptions
from prefopt.objective.core import inputs_of
from prefopt.objective.inputs import mean_log_prob_margin
from prefopt.objective.tables import LOSSES
from prefopt.report import diagnosis
from prefopt.report.diagnosis import diagnose
from prefopt.report.findings import MEANS, Run
from prefopt.report.learning_findings import learning_findings
from prefopt.report.series import MIN_ROWS, Series, series

LENGTH = 60
"""Rows of a run."""


def rows(seed: int = 0, *, length: int = LENGTH, noise: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    """A DPO run of 30 pairs a row that learns: each metric a function of the share t of the run, with noise.

    Args:
        seed: of the noise.
        length: rows.
        noise: 0 for none.
        changes: metric -> its mean as a function of t, in place of the healthy one's; ``_`` stands for ``/``.
    """
    draw = random.Random(seed)
    means = {
        "loss": lambda t: math.log(2) - 0.35 * t,
        "rewards/chosen": lambda t: 0.3 * t,
        "rewards/rejected": lambda t: -0.9 * t,
        "rewards/accuracies": lambda t: 0.5 + 0.3 * min(1, 3 * t),
        "logps/chosen": lambda t: -150 + 3 * t,
        "logps/rejected": lambda t: -160 - 9 * t,
        "grad_norm": lambda t: 8 - 4 * t,
    } | {name.replace("_", "/", 1) if name != "grad_norm" else name: mean for name, mean in changes.items()}
    scatter = {
        "loss": 0.04,
        "rewards/chosen": 0.05,
        "rewards/rejected": 0.05,
        "rewards/accuracies": 0.09,
        "logps/chosen": 12.0,
        "logps/rejected": 12.0,
        "grad_norm": 1.0,
    }
    found = []
    for number in range(length):
        t = number / max(1, length - 1)
        row = {name: mean(t) + noise * scatter[name] * draw.gauss(0, 1) for name, mean in means.items()}
        row["grad_norm"] = abs(row["grad_norm"])
        row["rewards/accuracies"] = min(1.0, max(0.0, row["rewards/accuracies"]))
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        found.append({"step": 10 * (number + 1), "epoch": t, **row})
    return found


def evaluations(
    accuracies: list[float], margins: list[float] | None = None, losses: list[float] | None = None
) -> list[dict[str, Any]]:
    """Rows of an evaluation set of 400 pairs, evenly over the run."""
    every = 10 * LENGTH // len(accuracies)
    margins = margins or [3 * (accuracy - 0.5) for accuracy in accuracies]
    both = enumerate(zip(accuracies, margins, strict=True))
    return [
        {
            "step": every * (number + 1),
            "eval_rewards/accuracies": accuracy,
            "eval_rewards/margins": margin,
            "eval_loss": losses[number] if losses else 0.5 + 2 * (max(accuracies[: number + 1]) - accuracy),
            "eval_logps/chosen": -150 + number,
            "eval_runtime": 4.0,
            "eval_samples_per_second": 100.0,
        }
        for number, (accuracy, margin) in both
    ]


FACTS: dict[str, Any] = {
    "method": "dpo",
    "status": "finished",
    "losses": ["sigmoid"],
    "options": {"beta": 0.1, "learning_rate": 5e-7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
    "data": {
        "train": {"rows": 1000, "kept": 995, "truncated": 20, "skipped": {"chosen equal to rejected": {"num": 4}}}
    },
}


def names(found: list[dict[str, Any]], facts: dict[str, Any] = FACTS) -> list[str]:
    return [finding.name for finding in diagnose(found, facts) if finding.level != "good"]


def with_data(**train: Any) -> dict[str, Any]:
    return {**FACTS, "data": {"train": {"rows": 1000, "kept": 900, "truncated": 0, "skipped": {}, **train}}}


def flat(value: float) -> Any:
    return lambda t: value


# -- healthy runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_nothing_is_said_of_a_run_that_learns(noise: float) -> None:
    """Of 30 seeds, with and without an evaluation set, and of runs of other lengths."""
    for seed in range(30):
        whole = rows(seed, noise=noise)
        assert names(whole) == [], seed
        assert names(whole + evaluations([0.6, 0.68, 0.71, 0.7])) == []
        assert names(whole[: 1 + 2 * seed], {**FACTS, "progress": (1 + 2 * seed) / LENGTH}) == []


def test_a_usual_fall_of_both_log_probs_is_not_named() -> None:
    """A few nats of 150, as in many runs of DPO that go well."""
    for seed in range(20):
        found = rows(seed, rewards_chosen=lambda t: -0.5 * t, rewards_rejected=lambda t: -1.5 * t)
        assert names(found) == [], seed


def test_methods_without_a_reference_begin_with_rewards_and_accuracies_of_their_own() -> None:
    """Half of the pairs are won before training, or none: the base model's taste is no finding."""
    for method, accuracy in (("cpo", 0.45), ("tpo", 0.0), ("cpo", 0.5)):
        facts = {**FACTS, "method": method, "options": {**FACTS["options"], "beta": 2.0}}
        found = rows(
            rewards_chosen=lambda t: -15 + t,
            rewards_rejected=lambda t: -16 - t,
            rewards_accuracies=lambda t, start=accuracy: start + 0.2 * t,
        )
        assert names(found, facts) == []


def test_pairs_that_are_hard_are_not_pairs_at_random() -> None:
    """Accuracy barely above a coin's, and a margin that is small and sure."""
    for seed in range(20):
        hard = {"rewards_chosen": flat(0.05), "rewards_rejected": flat(-0.05), "rewards_accuracies": flat(0.52)}
        assert names(rows(seed, **hard)) == [], seed


def test_won_pairs_that_still_teach_are_not_saturated() -> None:
    for seed in range(5):
        assert names(rows(seed, noise=0.1, rewards_accuracies=lambda t: min(1.0, 0.5 + 5 * t))) == []


def test_a_short_trial_that_learned_nothing_yet_is_left_alone() -> None:
    still = {"rewards_chosen": flat(0.0), "rewards_rejected": flat(0.0), "rewards_accuracies": flat(0.5)}
    for seed in range(20):
        found = [{**row, "step": row["step"] // 10} for row in rows(seed, **still)]
        assert names(found) == [], "60 steps of 32 pairs"
        assert names(rows(seed, **still)[:30], {**FACTS, "progress": 0.1}) == [], "a run that has just begun"


@pytest.mark.parametrize(
    "found", [[], [{"step": 1}], [{"step": 1, "loss": None, "epoch": None}], [{"step": 1, "loss": "x"}]]
)
def test_few_or_odd_rows_are_no_findings(found: list[dict[str, Any]]) -> None:
    assert names(found, {}) == []
    assert names(found) == []
    for length in range(MIN_ROWS * 2):
        assert names(rows(length=length)) == []


def test_the_good_word_is_of_evaluation() -> None:
    found = diagnose(rows() + evaluations([0.6, 0.7, 0.72]), FACTS)
    assert [(finding.name, finding.level) for finding in found] == [("preferences learned", "good")]
    assert diagnose(rows() + evaluations([0.51, 0.53, 0.52]), FACTS) == []


# -- sick runs -----------------------------------------------------------------------------------------------------


SICK: dict[str, tuple[Any, list[str]]] = {
    "both fall by a third": (
        lambda seed: rows(
            seed,
            rewards_chosen=lambda t: -5 * t,
            rewards_rejected=lambda t: -9 * t,
            logps_chosen=lambda t: -150 - 50 * t,
        ),
        ["likelihood displacement"],
    ),
    "every pair won, no gradient": (
        lambda seed: rows(
            seed,
            noise=0.1,
            rewards_accuracies=lambda t: min(1.0, 0.5 + 5 * t),
            grad_norm=lambda t: 8 * math.exp(-12 * t),
            loss=lambda t: 0.69 * math.exp(-8 * t),
        ),
        ["saturated margins"],
    ),
    "pairs at random": (
        lambda seed: rows(
            seed, rewards_chosen=flat(0.1), rewards_rejected=flat(0.1), rewards_accuracies=flat(0.5), loss=flat(0.7)
        ),
        ["accuracy 0.5, margin 0"],
    ),
    "no update": (
        lambda seed: rows(
            seed, noise=1e-6, rewards_chosen=flat(0.0), rewards_rejected=flat(0.0), rewards_accuracies=flat(0.5)
        ),
        ["learning rate too low"],
    ),
    "the loss doubles": (lambda seed: rows(seed, loss=lambda t: 0.69 + 1.5 * t), ["learning rate too high"]),
    "the language is lost": (
        lambda seed: rows(seed, logps_chosen=lambda t: -150 - 900 * t, rewards_chosen=lambda t: -90 * t),
        ["learning rate too high"],
    ),
    "the evaluation set is the other way round": (
        lambda seed: rows(seed) + evaluations([0.4, 0.3, 0.22], [-0.1, -0.4, -0.8]),
        ["chosen and rejected swapped"],
    ),
    "the loss has the wrong sign": (
        lambda seed: rows(
            seed,
            rewards_chosen=lambda t: -0.3 * t,
            rewards_rejected=lambda t: 0.9 * t,
            rewards_accuracies=lambda t: 0.5 - 0.3 * min(1, 3 * t),
        ),
        ["chosen and rejected swapped"],
    ),
    "evaluation pays for certainty": (
        lambda seed: rows(seed) + evaluations([0.6, 0.7, 0.71, 0.7], losses=[0.68, 0.6, 0.7, 0.9]),
        ["overfitting"],
    ),
    "evaluation has its best behind it": (
        lambda seed: rows(seed) + evaluations([0.62, 0.74, 0.72, 0.65, 0.6]),
        ["overfitting"],
    ),
}


@pytest.mark.parametrize("story", SICK)
def test_the_one_thing_that_is_wrong_is_named(story: str) -> None:
    made, expected = SICK[story]
    for seed in range(10):
        assert names(made(seed)) == expected, seed


def test_gradients_that_jump_again_and_again() -> None:
    found = rows()
    found[30]["grad_norm"] = 500.0
    assert names(found) == []
    for place in (35, 40, 50):
        found[place]["grad_norm"] = 300.0
    (finding,) = diagnose(found, FACTS)
    assert (finding.name, finding.step) == ("learning rate too high", 310)
    assert "4 of 60 rows" in finding.text


def test_a_row_that_is_not_finite_comes_before_what_follows_from_it() -> None:
    found = SICK["the loss doubles"][0](0)
    found[20] = {"step": 210, "loss": None, "not_finite": {"loss": "nan"}}
    (finding,) = diagnose(found, FACTS)
    assert (finding.name, finding.level, finding.step) == ("not finite", "bad", 210)
    (finding,) = diagnose([{"step": 1, "loss": float("nan")}, *rows()], FACTS)
    assert "loss is nan" in finding.text
    (finding,) = diagnose([{"step": 1, "loss": 0.7, "skipped_steps": 2.0}, *rows()], FACTS)
    assert "2 steps" in finding.text


def test_the_step_is_the_first_from_which_it_holds() -> None:
    """Log p(chosen) of -150 falls by 15 nats (a tenth) in the middle of the run, and stays there."""
    fall = {"rewards_chosen": lambda t: -2.0 if t > 0.5 else 0.0, "rewards_rejected": lambda t: -6 * t}
    found = rows(noise=0.0, **fall, logps_chosen=lambda t: -150 - (20 if t > 0.5 else 0))
    (finding,) = diagnose(found, FACTS)
    assert finding.name == "likelihood displacement"
    assert 310 <= finding.step <= 310 + 10 * MIN_ROWS


def test_means_per_token_have_a_limit_of_their_own() -> None:
    """SimPO logs them: 0.4 nats a token are much, 0.4 nats of a whole answer are nothing."""
    fall = {"logps_chosen": lambda t: -1.5 - 0.4 * t, "logps_rejected": lambda t: -1.6 - t}
    found = [{**row, "rewards/margins": 1.2 * number / LENGTH} for number, row in enumerate(rows(noise=0.0, **fall))]
    for loss, expected in (("simpo", ["likelihood displacement"]), ("sigmoid", [])):
        assert names(found, {**FACTS, "method": "cpo", "losses": [loss]}) == expected


def test_losses_of_means_are_those_of_the_objective() -> None:
    """The stage of reports may not ask the objective; this holds its list to it."""
    for method in ("cpo", "tpo"):
        for name in LOSSES[method]:
            per_token = (
                inputs_of(name, ObjectiveOptions(method=method, loss_type=name, beta=1.0)) is mean_log_prob_margin
            )
            assert per_token == (name in MEANS), (method, name)


# -- data and samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "expected", "level"),
    [
        ({"skipped": {"chosen equal to rejected": {"num": 49}}}, [], ""),
        ({"skipped": {"chosen equal to rejected": {"num": 50}}}, ["identical pairs"], "warn"),
        ({"skipped": {"chosen equal to rejected": {"num": 600}}}, ["identical pairs"], "bad"),
        ({"skipped": {"empty completion": {"num": 60}}}, ["skipped rows"], "warn"),
        ({"truncated": 99}, [], ""),
        (
            {"truncated": 60, "skipped": {"no completion token left within max_length": {"num": 40}}},
            ["truncation"],
            "warn",
        ),
        ({"truncated": 900}, ["truncation"], "bad"),
        ({"rows": None}, [], ""),
    ],
    ids=str,
)
def test_data_are_judged_by_shares(train: dict[str, Any], expected: list[str], level: str) -> None:
    found = diagnose(rows(), with_data(**train))
    assert [finding.name for finding in found] == expected
    assert all(finding.level == level and finding.step is None for finding in found)


def samples(before: int, now: int, count: int = 8) -> list[dict[str, Any]]:
    """Answers of so many words to the same prompts."""
    return [
        {"set": "eval", "step": step, "prompt": f"prompt {number}", "policy": "word " * (words + number % 3)}
        for step, words in ((0, before), (100, now))
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (samples(20, 24), []),
        (samples(20, 45), ["longer"]),
        (samples(40, 10), ["shorter"]),
        (samples(20, 45, count=3), []),
        (samples(20, 45)[:8], []),
    ],
    ids=["much the same", "longer", "shorter", "too few", "one step"],
)
def test_length_drift_is_of_the_same_prompts(given: list[dict[str, Any]], expected: list[str]) -> None:
    found = [finding for finding in diagnose(rows(), {**FACTS, "samples": given}) if finding.level != "good"]
    assert [finding.name for finding in found] == ["length drift"] * len(expected)
    assert all(word in finding.text for word, finding in zip(expected, found, strict=True))


# -- series --------------------------------------------------------------------------------------------------------


def test_a_series_knows_its_beginning_and_its_end() -> None:
    found = series([{"step": step, "loss": float(step)} for step in range(40)] + [{"step": 40, "loss": None}], "loss")
    assert len(found) == 40
    assert found.head.value == 2.0  # of 5
    assert found.tail.value == 34.5  # of 10
    assert found.tail.error == pytest.approx(math.sqrt(82.5 / 9) / math.sqrt(10))
    assert found.rise.value == 32.5
    assert not Series((), ()).head.differs(1.0)


# -- evaluations that broke --------------------------------------------------------------------------------------------


def broken(written: bool) -> list[dict[str, Any]]:
    """Evaluations whose every metric is NaN: as the log of a run has them, or as its file does."""
    found = []
    for row in evaluations([0.6, 0.7, 0.8]):
        odd = [name for name in row if name.startswith(("eval_loss", "eval_rewards", "eval_logps"))]
        values = {**row, **dict.fromkeys(odd, None if written else math.nan)}
        found.append({**values, "not_finite": dict.fromkeys(odd, "nan")} if written else values)
    return found


@pytest.mark.parametrize("written", [False, True], ids=["log", "file"])
def test_an_evaluation_without_numbers_is_the_finding(written: bool) -> None:
    found = diagnose(rows() + broken(written), {"method": "dpo"})
    assert [(finding.name, finding.step) for finding in found] == [("not finite", 200)]
    assert "eval_loss is nan" in found[0].text


def test_a_margin_without_a_number_beside_an_accuracy() -> None:
    """An accuracy counts pairs whose margin is above 0, and NaN is not."""
    of_set = [{**row, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": math.nan} for row in evaluations([0.6])]
    assert [finding.name for finding in diagnose(rows() + of_set, {"method": "dpo"})] == ["not finite"]


def test_a_metric_of_the_users_may_be_nan() -> None:
    of_set = [{**row, "eval_spearman": math.nan} for row in evaluations([0.6, 0.7, 0.8])]
    assert [finding.name for finding in diagnose(rows() + of_set, {"method": "dpo"})] == ["preferences learned"]


def test_sets_without_numbers_are_no_sets() -> None:
    run = Run(rows() + broken(True), {"method": "dpo"})
    assert run.evaluation_sets == []
    assert {finding.level for finding in learning_findings(run)} <= {"good"}


def test_a_rule_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any) -> list[Any]:
        raise IndexError("no such row")

    monkeypatch.setattr(diagnosis, "learning_findings", fails)
    facts = {"method": "dpo", "data": {"train": {"rows": 10, "truncated": 9}}}
    found = diagnose(rows(), facts)
    assert [finding.name for finding in found] == ["truncation", "diagnosis failed"]
    assert "IndexError('no such row')" in found[1].text
