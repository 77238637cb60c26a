"""A run that is paused where the program says so, as a sweep does at the end of each turn."""

from __future__ import annotations

import json
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
    monkeypatch.delenv("PREFOPT_CURVES", raising=False)
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
    assert not (tmp_path / "curves.png").exists(), "which the end of the run draws"


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
