"""A run that is paused where the program says so, as a sweep does at the end of each turn."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from short_runs import dataset, log_rows, trainer, weights

from prefopt.trainer.ending.signals import PausedRun

OPTIONS = {"eval_dataset": dataset(8, seed=1), "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}


@pytest.mark.parametrize(("at", "save_steps", "is_extra"), [(3, 2, True), (3, 3, False), (2, 5, True)])
def test_a_pause_leaves_evaluation_record_and_checkpoint(
    at: int, save_steps: int, is_extra: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFOPT_REPORT", raising=False)
    run = trainer(tmp_path, save_strategy="steps", save_steps=save_steps, **OPTIONS)
    run.pauses = lambda step: step == at
    with pytest.raises(PausedRun) as paused:
        run.train()
    assert (paused.value.step, paused.value.is_extra) == (at, is_extra)
    assert paused.value.checkpoint == str(tmp_path / f"checkpoint-{at}")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == ([3] if at == 3 else [])
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["steps"], record["reason"]) == ("paused", at, None)
    assert not (tmp_path / "report.html").exists(), "which the end of the run draws"


def test_what_was_saved_for_a_pause_is_never_the_best_checkpoint(tmp_path: Path) -> None:
    """The highest loss, which is the first, is called the best: after the pause at step 1, where no run saves."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options = OPTIONS | {"eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2} | best
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    for stops in (1, 3, None):
        part = trainer(tmp_path / "parts", **options)
        part.pauses = lambda step, stops=stops: step == stops
        with nullcontext() if stops is None else pytest.raises(PausedRun):
            part.train(resume_from_checkpoint=True)
    assert (tmp_path / "parts" / "checkpoint-1").is_dir()
    assert (part.state.best_global_step, whole.state.best_global_step) == (1, 1)
    assert part.state.best_model_checkpoint is whole.state.best_model_checkpoint is None
    assert torch.equal(weights(part.model), weights(whole.model))


def test_a_pause_at_every_step_changes_nothing(tmp_path: Path) -> None:
    """10 steps an epoch: pauses lie within the first, at its end and in the second one."""
    whole = trainer(tmp_path / "whole", **(OPTIONS | {"max_steps": 12}))
    whole.train()
    asked: list[int] = []
    while True:
        part = trainer(tmp_path / "parts", **(OPTIONS | {"max_steps": 12}))
        start = asked[-1] if asked else 0
        part.pauses = lambda step, start=start: asked.append(step) or step >= start + 3
        try:
            part.train(resume_from_checkpoint=True)
            break
        except PausedRun:
            continue
    assert asked == list(range(1, 12)), "never at the last step, which ends the run"
    assert torch.equal(weights(part.model), weights(whole.model))
    assert log_rows(part) == log_rows(whole)
