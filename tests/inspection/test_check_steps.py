"""The steps that `prefopt check` tries: which they are, what they show, and what time they foretell."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checked_runs import check, problems, rows_of, write
from datasets import Dataset
from short_runs import dataset, trainer

from prefopt.inspection.checking.need import num_evaluations, run_need
from prefopt.inspection.checking.plan import num_steps, plan_trial, step_sizes

LN_2_EXACT = 1e-6
"""float32, one mean over a step."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- steps -------------------------------------------------------------------------------------------------------------


def uneven(count: int = 60) -> Dataset:
    """Rows of very different lengths."""
    rows: Any = dataset(count).to_dict()
    rows["chosen"] = [" ".join([text] * (1 + index % 7)) for index, text in enumerate(rows["chosen"])]
    return Dataset.from_dict(rows)


@pytest.mark.parametrize(
    "options", [{}, {"tokens_per_batch": 60}, {"layout": "padded"}], ids=["pairs", "budget", "padded"]
)
def test_the_steps_are_those_of_the_run_and_the_largest_is_tried(options, tmp_path):
    run = trainer(
        tmp_path / "out", rows=uneven(), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, **options
    )
    sizes = step_sizes(run)
    loader = run.get_train_dataloader()
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step in loader:
            size = next(sizes)
            rows = [row["row"] for batch in step.sources for row in batch]
            assert sorted(rows) == sorted(size.rows), "the rows of a step; a budget deals them out in another order"
            tokens = [batch.model_inputs["input_ids"].numel() for batch in step.micro_batches]
            assert (size.largest, size.tokens) == (max(tokens), sum(tokens))
            seen.append((max(tokens), frozenset(size.rows)))
    assert num_steps(run) == len(seen) == 16
    plan = plan_trial(run)
    tried = {frozenset(step) for step in plan.steps}
    assert max(most for most, _ in seen) in {most for most, rows in seen if rows in tried}
    assert len(tried) == len(plan.steps)


def test_the_first_loss_is_ln_2_and_nothing_is_left_behind(tmp_path, reference_cache):
    write(rows_of())
    Path("out").mkdir()
    Path("out", "notes.txt").write_text("mine")
    before = dict(os.environ)
    checked, need = check(save_strategy="steps", save_steps=1, logging_steps=1, learning_rate=2e-5, warmup_steps=0)
    assert checked.findings.will_run
    trial = checked.trial
    assert trial is not None
    assert need is not None
    assert trial.expected_loss == pytest.approx(math.log(2))
    assert trial.loss == pytest.approx(math.log(2), abs=LN_2_EXACT)
    assert math.isfinite(trial.grad_norm)
    assert trial.grad_norm > 0
    assert trial.learning_rate == pytest.approx(2e-5)
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "run.yaml"]
    assert not reference_cache.exists()
    assert dict(os.environ) == before
    assert need.total == pytest.approx(4 * need.step)


def test_an_adapter_an_evaluation_and_the_pass_before(capsys):
    Path("data").mkdir()
    write(rows_of(), "data/train.jsonl")
    write(rows_of(10), "data/test.jsonl")
    values = {"use_peft": True, "lora_target_modules": ["q_proj"], "precompute_ref_log_probs": True}
    checked, need = check(dataset_name="data", eval_strategy="steps", eval_steps=2, **values)
    assert checked.findings.will_run
    assert checked.model is not None
    assert 0 < checked.model.trained < 0.1 * checked.model.parameters
    assert need is not None
    assert need.num_evaluations == 2
    assert need.evaluation is not None
    assert need.evaluation > 0
    assert need.reference is not None
    assert need.total == pytest.approx(need.training + need.evaluation + need.reference)


def test_what_ends_the_steps_is_a_problem_with_its_option():
    write(rows_of())
    checked, need = check(use_peft=True, lora_target_modules=["nothing"])
    assert need is None
    (problem,) = problems(checked)
    assert "nothing" in problem.what


def test_a_loss_other_than_the_logistic_one_has_no_expected_value():
    write(rows_of())
    for values in ({"loss_type": "ipo"}, {"method": "cpo", "loss_type": "simpo"}):
        checked, _ = check(**values)
        assert checked.findings.will_run, checked.findings.problems
        assert checked.trial is not None
        assert checked.trial.expected_loss is None


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "every", "on_start", "expected"),
    [("no", 10, False, 0), ("steps", 10, False, 2), ("steps", 0.1, True, 9), ("epoch", 10, False, 4)],
    ids=["none", "steps", "share", "epoch"],
)
def test_how_often_a_run_evaluates(strategy, every, on_start, expected):
    args = SimpleNamespace(eval_strategy=strategy, eval_steps=every, eval_on_start=on_start)
    assert num_evaluations(args, num_steps=24, steps_per_epoch=7) == expected


def test_the_time_of_a_run_is_the_sum_of_its_parts():
    args = SimpleNamespace(eval_strategy="epoch", eval_steps=None, eval_on_start=False)
    trial: Any = SimpleNamespace(
        plan=SimpleNamespace(num_steps=20),
        pairs_per_step=10,
        seconds_per_step=2.0,
        eval_seconds_per_pair=0.5,
        reference_seconds_per_pair=0.1,
    )
    need = run_need(args, trial, 100, 30, is_stream=False)
    assert (need.epoch, need.training, need.evaluation, need.reference) == (20.0, 40.0, 30.0, pytest.approx(13.0))
    assert need.total == pytest.approx(83.0)
