"""Runs whose micro-batches are cut by a budget of tokens: the step stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_cases import CONFIGS, make, mistakes_of, warnings_of
from short_runs import dataset, log_rows, relative_difference, trainer, weights
from tiny_models import tiny_model, word_tokenizer

from prefopt import DataCollatorForPreference, DPOTrainer
from prefopt.batching import GroupLengths, TokenBudget
from prefopt.trainer.config import DPOConfig
from prefopt.trainer.geometry import Geometry
from prefopt.trainer.loader import make_loader
from prefopt.types import PAIR, OptimizerStep

pytestmark = pytest.mark.filterwarnings("ignore:.*is below max_length:UserWarning")

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm after ten steps in float32: only the order of summation differs."""
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 10, "lr_scheduler_type": "constant"}
TINY, MIDDLE, HUGE = 1, 80, 100_000
"""Tokens: a micro-batch per pair, a few pairs each, and one for the whole step."""
LAYOUTS = ("shared_prompt", "packed", "padded")
LOSSES = [
    ("dpo", {"loss_type": ["sigmoid", "sft"]}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    ("tpo", {"loss_type": "tpo-l", "beta": 0.5}),
]


def tokens_of(batch: Any) -> int:
    return batch.model_inputs["input_ids"].numel()


def step_rows(step: OptimizerStep) -> list[int]:
    return [row for batch in step.micro_batches for row in batch.rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("method", "options"), LOSSES, ids=lambda value: str(value)[:40])
def test_every_budget_gives_the_same_weights(method: str, options: dict, layout: str, tmp_path: Path) -> None:
    """21 rows and 8 pairs a step: the last step of an epoch has 5."""
    options = {**SGD, **options, "layout": layout, "gradient_accumulation_steps": 2, "count": 21}
    expected = trainer(tmp_path, method, **options)
    start = weights(expected.model)
    expected.train()
    assert relative_difference(weights(expected.model), start) > 1e-3  # it has moved, so that the test says something
    for budget in (TINY, MIDDLE, HUGE):
        run = trainer(tmp_path, method, tokens_per_batch=budget, **options)
        assert run.layout.layout == layout
        numbers = [len(step.micro_batches) for step in run.get_train_dataloader()]
        if budget == MIDDLE:
            assert 1 < numbers[0] < 8
        else:
            assert numbers == ([8, 8, 5] if budget == TINY else [1, 1, 1])
        run.train()
        assert relative_difference(weights(run.model), weights(expected.model)) < WEIGHTS_TOLERANCE, budget
        for row, expected_row in zip(log_rows(run), log_rows(expected), strict=True):
            assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6), budget


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_stay_within_the_budget_and_steps_are_the_users(
    layout: str, stream: bool, tmp_path: Path
) -> None:
    """The same rows in each step, the largest micro-batch first, and at most one pair where the budget is exceeded."""
    steps, options = {}, {"layout": layout, "per_device_train_batch_size": 8, "pad_to_multiple_of": None}
    for budget in (None, MIDDLE):
        rows = dataset(40).to_iterable_dataset() if stream else None
        run = trainer(tmp_path, rows=rows, tokens_per_batch=budget, max_steps=5, **options)
        loader = iter(run.get_train_dataloader())
        steps[budget] = [next(loader) for _ in range(5)]
    for step, expected in zip(steps[MIDDLE], steps[None], strict=True):
        assert sorted(step_rows(step)) == sorted(step_rows(expected))
        places = [place for own in step.places for place in own]
        assert [step_rows(expected)[place] for place in places] == step_rows(step)
        tokens = [tokens_of(batch) for batch in step.micro_batches]
        assert tokens == sorted(tokens, reverse=True)
        assert 1 < len(tokens) < 8
        assert all(n <= MIDDLE or len(batch.rows) == 1 for n, batch in zip(tokens, step.micro_batches, strict=True))


def test_a_given_collator_is_counted_as_padded(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), per_device_train_batch_size=8, tokens_per_batch=MIDDLE, report_to="none")
    run = DPOTrainer(
        tiny_model(),
        args=args,
        data_collator=DataCollatorForPreference(0),
        train_dataset=dataset(16),
        processing_class=word_tokenizer(),
    )
    batches = [batch for step in run.get_train_dataloader() for batch in step.micro_batches]
    assert any(len(batch.rows) > 1 for batch in batches)
    assert all(len(batch.rows) == 1 or tokens_of(batch) <= MIDDLE for batch in batches)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [None, 1, 60, 10_000])
def test_ranks_share_a_step(count: int, world_size: int, budget: int | None) -> None:
    """Every pair on one rank, the same number of micro-batches on all, about as much work, and dummies for nothing."""
    rng = np.random.default_rng(count)
    lengths = GroupLengths(rng.integers(1, 10, count), np.zeros((count, 2), int), rng.integers(1, 15, (count, 2)))
    limit = TokenBudget(budget, "shared_prompt", PAIR) if budget else None
    shares = [
        list(Geometry(2, 4, world_size, rank, limit).shares(count, lengths if limit else None))
        for rank in range(world_size)
    ]
    assert len({len(own) for own in shares}) == 1
    assert sorted(place for own in shares for share in own for place in share.places if share.weight) == [*range(count)]
    assert all(share.weight or len(share.places) == 1 for own in shares for share in own)
    if limit:
        work = [[lengths.totals[[*share.places]].sum() * share.weight for share in own] for own in shares]
        totals = [sum(own) for own in work]
        assert max(totals) - min(totals) <= max(max(own) for own in work)


def test_who_has_the_largest_of_one_round_gets_the_smallest_of_the_next() -> None:
    """Pairs of 40, 30, 20 and 10 tokens, a micro-batch each: 50 tokens for either rank."""
    lengths = GroupLengths(np.array([10, 30, 20, 40]) - 2, np.zeros((4, 2), int), np.ones((4, 2), int))
    budget = TokenBudget(40, "shared_prompt", PAIR)
    shares = [[*Geometry(2, 1, 2, rank, budget).shares(4, lengths)] for rank in range(2)]
    assert shares == [[([3], 1.0, 1), ([0], 1.0, 1)], [([1], 1.0, 1), ([2], 1.0, 1)]]


def test_a_sampler_by_length_sorts_whole_steps(tmp_path: Path) -> None:
    """Its mega-batches consist of whole steps: within a step lengths fall, but where the longest row was put first."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "layout": "padded", "count": 400}
    unsorted = {}
    for strategy in ("group_by_length", "random"):
        run = trainer(tmp_path, train_sampling_strategy=strategy, tokens_per_batch=200, **options)
        loader = run.get_train_dataloader()
        assert sorted(row for step in loader for row in step_rows(step)) == list(range(400))
        lengths = loader.dataset.lengths.totals
        unsorted[strategy] = sum((np.diff(lengths[[*indices]]) > 0).any() for indices in loader.batch_sampler)
    assert unsorted["group_by_length"] <= 1
    assert unsorted["random"] > 40


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_does_not_depend_on_the_budget(layout: str, stream: bool, tmp_path: Path) -> None:
    """Neither do the predictions, which stay in the order of the set although micro-batches are not."""
    found, orders = {}, {}
    for budget in (None, TINY, MIDDLE):
        seen: list[Any] = []
        run = trainer(
            tmp_path,
            layout=layout,
            eval_dataset=dataset(12, seed=5).to_iterable_dataset() if stream else dataset(12, seed=5),
            per_device_eval_batch_size=5,
            tokens_per_batch=budget,
            compute_metrics=lambda prediction, seen=seen: seen.append(prediction) or {},
        )
        metrics = {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}
        found[budget] = metrics, np.stack([*seen[0].predictions[:4], *seen[0].label_ids])
        orders[budget] = [row for step in run.get_eval_dataloader() for row in step_rows(step)]
    assert orders[None] == list(range(12)) != orders[MIDDLE]
    for budget in (TINY, MIDDLE):
        assert found[budget][0] == pytest.approx(found[None][0], rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(found[budget][1], found[None][1], rtol=1e-5, atol=1e-5)


def test_full_logits_are_padded_batches_within_the_budget(tmp_path: Path) -> None:
    """The layout of these batches is the padded one, and so is what the budget counts."""
    seen: list[Any] = []
    run = trainer(
        tmp_path,
        eval_dataset=dataset(6, seed=1),
        full_logits_for_metrics=True,
        tokens_per_batch=MIDDLE,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
    )
    run.evaluate()
    batches = [batch for step in run.get_eval_dataloader() for batch in step.micro_batches]
    assert all(len(batch.rows) == 1 or tokens_of(batch) <= MIDDLE for batch in batches)
    row = run.eval_dataset[2]
    ids = torch.tensor([[*row["prompt_ids"], *row["rejected_ids"]]])
    with torch.no_grad():
        expected = run.model(ids).logits[0].numpy()
    np.testing.assert_allclose(seen[0].predictions.logits[2][1, : ids.shape[1]], expected, atol=1e-5)


def test_the_reference_is_scored_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass before training; the log-probs are those of a pass without a budget."""
    seen: list[Any] = []

    def watched(rows: Any, collate: Any, *arguments: Any, **options: Any) -> Any:
        def noted(*given: Any) -> Any:
            seen.append(collate(*given))
            return seen[-1]

        return make_loader(rows, noted, *arguments, **options)

    monkeypatch.setattr("prefopt.trainer.precompute.make_loader", watched)
    found = {}
    for budget in (None, MIDDLE):
        monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / f"cache-{budget}"))
        run = trainer(
            tmp_path, tokens_per_batch=budget, precompute_ref_log_probs=True, precompute_ref_batch_size=10, count=20
        )
        seen.clear()
        rows = run.get_train_dataloader().dataset.rows
        found[budget] = [rows[column] for column in ("ref_chosen_logps", "ref_rejected_logps")]
    assert sorted(row for batch in seen for row in batch.rows) == list(range(20))
    assert any(len(batch.rows) > 1 for batch in seen)
    assert all(len(batch.rows) == 1 or tokens_of(batch) <= MIDDLE for batch in seen)
    np.testing.assert_allclose(found[MIDDLE], found[None], rtol=1e-5)


# Options


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("value", [0, -5, 1.5, True, "auto"])
def test_a_budget_is_a_positive_whole_number(config: Any, value: Any) -> None:
    assert f"tokens_per_batch={value!r}: must be a whole number of at least 1" in mistakes_of(
        config, tokens_per_batch=value
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"tokens_per_batch": 1023}, "tokens_per_batch=1023 is below max_length=1024"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True acts only where ranks divide the model"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter=True has no effect"),
    ],
)
def test_what_a_user_may_not_expect_gets_a_warning(options: dict, part: str) -> None:
    (found,) = warnings_of(DPOConfig, **options)
    assert part in found


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "aot"]},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "bco_pair", "bco_shift": True, "beta": 2.0},
    ],
    ids=str,
)
def test_losses_of_the_whole_step_do_not_see_the_cut(options: dict, tmp_path: Path) -> None:
    shared = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "lr_scheduler_type": "constant", **options}
    whole, cut = (trainer(tmp_path, tokens_per_batch=budget, **shared) for budget in (None, MIDDLE))
    for run in (whole, cut):
        run.train()
    assert relative_difference(weights(cut.model), weights(whole.model)) < WEIGHTS_TOLERANCE


def test_the_load_balancing_loss_is_refused(tmp_path: Path) -> None:
    """It is off with a coefficient of 0, and then the model trains."""
    options = {"tokens_per_batch": MIDDLE, "max_steps": 1}
    with pytest.raises(ValueError, match="load-balancing loss of Qwen3MoeForCausalLM is a function of the micro-batch"):
        trainer(tmp_path, model=tiny_model("qwen3_moe", router_aux_loss_coef=0.5), **options)
    run = trainer(tmp_path, model=tiny_model("qwen3_moe"), router_aux_loss_coef=0.0, **options)
    assert run.train().global_step == 1


def test_a_usual_budget_gives_no_warning() -> None:
    assert warnings_of(DPOConfig, tokens_per_batch=1024) == []
    assert warnings_of(DPOConfig, tokens_per_batch=8, max_length=None) == []
    assert make(DPOConfig).tokens_per_batch is None
