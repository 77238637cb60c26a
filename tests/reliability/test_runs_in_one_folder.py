"""Runs one after another in one folder: each goes on from its own checkpoints, and keeps and deletes no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import log_rows, trainer, weights
from transformers import TrainerCallback

from prefopt.checkpoints.folder import checkpoints_in
from prefopt.checkpoints.manifest import faults

EARLIER: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
LATER: dict[str, Any] = {**EARLIER, "max_steps": 7, "beta": 0.3, "save_total_limit": 2}


class Dies(TrainerCallback):
    """A run that ends after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def dying(folder: Path, step: int, resume: Any = None, **options: Any) -> Any:
    run = trainer(folder, callbacks=[Dies(step)], **options)
    with pytest.raises(KeyboardInterrupt):
        run.train(resume)
    return run


def test_a_later_run_goes_on_from_its_own(tmp_path: Path) -> None:
    """The earlier run was longer, so its last checkpoint has the higher step."""
    trainer(tmp_path / "run", **EARLIER).train()
    dying(tmp_path / "run", 7, **LATER)
    assert set(checkpoints_in(tmp_path / "run")) == {8, 6, 4}  # 2 was replaced, and made room for 6
    resumed, whole = trainer(tmp_path / "run", **LATER), trainer(tmp_path / "whole", **LATER)
    resumed.train(True)
    whole.train()
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_rows(resumed) == log_rows(whole)
    assert set(checkpoints_in(tmp_path / "run")) == {8, 7, 6}
    assert not faults(tmp_path / "run" / "checkpoint-8")


def test_the_name_is_kept_when_a_run_goes_on(tmp_path: Path) -> None:
    """All checkpoints of a run count, whichever process wrote them."""
    options = {**EARLIER, "save_total_limit": 2}
    for step in (3, 5, 7):
        dying(tmp_path, step, True, **options)
    assert list(checkpoints_in(tmp_path)) == [6, 4]
    trainer(tmp_path / "other", **options).train(str(tmp_path / "checkpoint-4"))
    assert list(checkpoints_in(tmp_path / "other")) == [8, 6]


def test_what_was_written_last_is_the_newest(tmp_path: Path) -> None:
    """A run that was taken up again further back, with a change, goes on from there."""
    trainer(tmp_path, **EARLIER).train()
    changed = {**EARLIER, "beta": 0.3, "allow_changes": True}
    dying(tmp_path, 5, str(tmp_path / "checkpoint-2"), **changed)
    again = trainer(tmp_path, **changed)
    again.train(True)
    assert [row["step"] for row in again.state.log_history if "loss" in row] == list(range(1, 9))
    assert {name: was for name, (was, _) in again.changes.items()} == {}


def test_no_checkpoint_of_another_run_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    trainer(tmp_path, **EARLIER).train()
    dying(tmp_path, 3, **LATER)
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no good checkpoint to go on from:\n.*checkpoint-2: model\.safetensors"):
        trainer(tmp_path, **LATER).train(True)


def test_a_checkpoint_of_another_library_is_no_damaged_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is passed over without a word where the run has its own."""
    theirs = tmp_path / "checkpoint-100"
    theirs.mkdir()
    for name in ("trainer_state.json", "optimizer.pt", "training_args.bin"):
        (theirs / name).touch()
    dying(tmp_path, 3, **LATER)
    resumed = trainer(tmp_path, **LATER)
    resumed.train(True)
    assert "damaged" not in caplog.text
    assert resumed.state.global_step == 7
    assert theirs.is_dir()
