"""Runs on rows that rank more than two completions, against runs on their pairs in the padded layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from encoder_decoders import tiny_encoder_decoder
from short_runs import log_rows, relative_difference, trainer, weights
from tiny_models import text, tiny_model

from prefopt.batching import pack_batch, pad_batch, share_batch
from prefopt.data import tokenized_example

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm after a few steps in float32: only the order of summation differs."""
LAYOUT_TOLERANCE = 1e-5
"""The same between layouts, whose attention rounds otherwise."""
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2}
FIRST = ["baba", "dada", "fafa", "gaga"]
"""Completions part at their first word."""
LOSSES = [
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"]}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    ("tpo", {"loss_type": "tpo-l", "beta": 0.5}),
]


def rankings(counts: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows with as many completions as ``counts`` says, and a gold one."""
    rng = random.Random(seed)
    return [
        {
            "prompt": text(rng, 2, 9),
            "completions": [f" {first} {text(rng, 1, 9)}" for first in FIRST[:count]],
            "reference": f" mama {text(rng, 1, 9)}",
        }
        for count in counts
    ]


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per pair, which weighs as much as the others of its ranking together with it weigh 1."""
    result = []
    for row in rows:
        given = row["completions"]
        pairs = [(j, k) for j in range(len(given)) for k in range(j + 1, len(given))]
        shared = {"prompt": row["prompt"], "reference": row["reference"], "weight": 1 / len(pairs)}
        result += [{**shared, "chosen": given[j], "rejected": given[k]} for j, k in pairs]
    return result


def trained(folder: Path, method: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    run = trainer(folder, method, rows=Dataset.from_list(rows), **{**SGD, **options})
    start = weights(run.model)
    run.train()
    assert relative_difference(weights(run.model), start) > 1e-3  # it has moved, so that a comparison says something
    return run


def losses_of(run: Any) -> list[float]:
    return [row["loss"] for row in log_rows(run) if "loss" in row]


@pytest.mark.parametrize("layout", ["shared_prompt", "packed", "padded"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("tpo", {"loss_type": "ipo", "beta": 0.5, "tpo_alpha": 0.0}),
    ],
    ids=["dpo", "cpo", "tpo"],
)
def test_a_ranking_is_the_mean_of_its_pairs(method: str, options: dict, layout: str, tmp_path: Path) -> None:
    """Rows of 2, 3 and 4 completions in one micro-batch."""
    rows = rankings([4, 2, 3, 3])
    pairs = pairs_of(rows)
    oracle = trained(tmp_path, method, pairs, layout="padded", per_device_train_batch_size=len(pairs), **options)
    run = trained(tmp_path, method, rows, layout=layout, num_completions=4, **options)
    assert run.layout.layout == layout
    assert relative_difference(weights(run.model), weights(oracle.model)) < LAYOUT_TOLERANCE
    assert losses_of(run) == pytest.approx(losses_of(oracle), rel=1e-4)


def test_rankings_of_an_encoder_decoder_model(tmp_path: Path) -> None:
    rows = rankings([3, 2, 3])
    pairs = pairs_of(rows)
    found = [
        trained(
            tmp_path,
            "dpo",
            given,
            model=tiny_encoder_decoder("t5", seed=1),
            per_device_train_batch_size=len(given),
            num_completions=most,
            max_completion_length=32,
        )
        for given, most in ((rows, 3), (pairs, 2))
    ]
    assert relative_difference(weights(found[0].model), weights(found[1].model)) < LAYOUT_TOLERANCE
    assert losses_of(found[0]) == pytest.approx(losses_of(found[1]), rel=1e-4)


@pytest.mark.parametrize("ranking", ["all_pairs", "plackett_luce"])
@pytest.mark.parametrize(("method", "options"), LOSSES, ids=["dpo", "cpo", "tpo"])
def test_a_ranking_of_two_is_the_pair(method: str, options: dict, ranking: str, tmp_path: Path) -> None:
    """Loss, weights and every logged number; also in a run whose rows could have more."""
    options = {**options, "ranking": ranking} if ranking == "all_pairs" else {**options, **LOGISTIC[method]}
    rows = rankings([2] * 8)
    plain = [{**row, "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in rows]
    expected = trained(tmp_path, method, plain, **{k: v for k, v in options.items() if k != "ranking"})
    for most in (2, 3) if ranking == "all_pairs" else (3,):
        own = {k: v for k, v in options.items() if k != "ranking" or most > 2}
        run = trained(tmp_path, method, rows, num_completions=most, **own)
        assert relative_difference(weights(run.model), weights(expected.model)) < WEIGHTS_TOLERANCE
        for row, expected_row in zip(log_rows(run), log_rows(expected), strict=True):
            assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)


LOGISTIC: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid", "sft"], "ranking": "plackett_luce"},
    "cpo": {"ranking": "plackett_luce"},
    "tpo": {"ranking": "plackett_luce"},
}


@pytest.mark.parametrize(("method", "options"), LOSSES, ids=["dpo", "cpo", "tpo"])
def test_every_split_gives_the_same_weights(method: str, options: dict, tmp_path: Path) -> None:
    """With NLLs, weights of rows, and rows of 2 to 4 completions; also as a stream, and within a budget of tokens."""
    rows = [{**row, "weight": float(i % 3)} for i, row in enumerate(rankings([4, 2, 3, 3, 4, 2, 2, 4]))]
    options = {**options, "num_completions": 4, "train_sampling_strategy": "sequential"}
    whole = trained(tmp_path, method, rows, per_device_train_batch_size=8, **options)
    ways: list[dict[str, Any]] = [{"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1}]
    ways.append({"per_device_train_batch_size": 8, "tokens_per_batch": 100, "max_length": 64})
    for way in ways:
        run = trained(tmp_path, method, rows, **{**options, **way})
        assert relative_difference(weights(run.model), weights(whole.model)) < WEIGHTS_TOLERANCE
        for row, expected in zip(log_rows(run), log_rows(whole), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    run = trainer(tmp_path, method, rows=stream, **{**SGD, **options, "per_device_train_batch_size": 8})
    run.train()
    assert relative_difference(weights(run.model), weights(whole.model)) < WEIGHTS_TOLERANCE


def test_the_prompt_and_each_completion_are_computed_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows=Dataset.from_list(rankings([4, 2, 3])), num_completions=4)
    examples = [tokenized_example(row, run.preference.branches) for row in run.train_dataset]
    once = sum(len(e.prompt_ids) + sum(map(len, e.completion_ids.values())) for e in examples)
    shared, packed, padded = (make(examples, run.preference.branches) for make in (share_batch, pack_batch, pad_batch))
    assert shared.model_inputs["input_ids"].numel() == once
    counted = sum(len(e.prompt_ids) + len(ids) for e in examples for ids in e.completion_ids.values() if len(ids))
    assert {batch.num_model_tokens for batch in (shared, packed, padded)} == {counted}


def test_every_spelling_of_the_rows_gives_the_same(tmp_path: Path) -> None:
    """The prompt inside the completions; messages; truncation at the start, beyond which prompts may part."""
    rows = rankings([4, 2, 3, 4])
    inside = [{"completions": [row["prompt"] + given for given in row["completions"]]} for row in rows]
    plain = [{key: row[key] for key in ("prompt", "completions")} for row in rows]
    prepared = [
        trainer(tmp_path, rows=Dataset.from_list(given), num_completions=4).train_dataset for given in (plain, inside)
    ]
    assert prepared[0].to_list() == prepared[1].to_list()
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [[{"role": "assistant", "content": given.strip()}] for given in row["completions"]],
        }
        for row in rows
    ]
    conversational = trainer(tmp_path, rows=Dataset.from_list(messages), num_completions=4).train_dataset
    assert [len(row["rank_3_ids"]) > 0 for row in conversational] == [True, False, True, True]
    short = {"max_length": 12, "truncation_mode": "keep_end", "num_completions": 4}
    ends = [trained(tmp_path, "dpo", plain, layout=layout, **short) for layout in ("shared_prompt", "padded")]
    assert relative_difference(weights(ends[0].model), weights(ends[1].model)) < LAYOUT_TOLERANCE


def test_the_log_shows_the_best_and_the_mean_of_the_others(tmp_path: Path) -> None:
    """Against SimPO's rewards of each completion, evaluated as pairs."""
    rows = rankings([3, 3, 2])
    options: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "model": tiny_model(seed=4)}
    run = trainer(tmp_path, "cpo", rows=Dataset.from_list(rows), num_completions=3, **options)
    found = run.evaluate(Dataset.from_list(rows))
    rewards = []
    for row in rows:
        best, *others = row["completions"]
        pairs = [{"prompt": row["prompt"], "chosen": best, "rejected": other} for other in others]
        pair_run = trainer(tmp_path, "cpo", rows=Dataset.from_list(pairs), **options)
        metrics = pair_run.evaluate(Dataset.from_list(pairs))
        rewards.append((metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]))
    chosen, rejected = torch.tensor(rewards).T
    assert found["eval_rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert found["eval_rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
    assert found["eval_rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3)
    assert found["eval_rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())


@pytest.mark.parametrize(
    ("completions", "problem"),
    [
        ([" baba", " dada", " fafa", " gaga"], "there are 4 completions, and num_completions is 3"),
        ([" baba"], "there are 1 completions"),
        ("baba", "expected a list of completions, got str"),
    ],
)
def test_a_broken_ranking_names_row_and_column(completions: Any, problem: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "mama", "completions": completions}])
    with pytest.raises(ValueError, match=f"train data, row 0, column 'completions': {problem}"):
        trainer(tmp_path, rows=rows, num_completions=3)


@pytest.mark.parametrize("column", ["margin", "ref_chosen_logps"])
def test_columns_of_a_pair_are_refused(column: str, tmp_path: Path) -> None:
    numbers = {column: 0.5} if column == "margin" else {column: -9.0, "ref_rejected_logps": -9.0}
    rows = [{**row, **numbers} for row in rankings([3, 2])]
    with pytest.raises(ValueError, match=f"train data, column '{column}': .* set num_completions=2"):
        trainer(tmp_path, rows=Dataset.from_list(rows), num_completions=3)


def test_a_column_beside_chosen_is_not_a_ranking(tmp_path: Path) -> None:
    """Sets of scored completions often keep all of them beside the pair that was made of them."""
    rows = [{"prompt": "mama", "chosen": " baba", "rejected": " dada", "completions": [{"response": "fafa"}]}]
    run = trainer(tmp_path, rows=Dataset.from_list(rows))
    assert set(run.train_dataset.column_names) == set(trainer(tmp_path).train_dataset.column_names) - {
        column for column in trainer(tmp_path).train_dataset.column_names if column.startswith("reference")
    }
