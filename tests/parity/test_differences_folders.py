"""The folder of a checkpoint: what is damaged, what is not there, what two runs share, what a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from parity_harness import REFERENCE, Library, build
from tiny_models import tiny_model

from prefopt.checkpoints.folder import LOCK

pytestmark = pytest.mark.trl

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}


def made(library: Library, **options: Any) -> Any:
    return build(library, "dpo", {**SAVED, **options}, ref_model=tiny_model(**REFERENCE))


def resumed_from_damaged(library: Library) -> tuple[Any, bytes]:
    """A run that is to go on from its newest checkpoint, where one bit of the weights is flipped; these weights."""
    run = made(library)
    run.train()
    path = Path(run.args.output_dir, "checkpoint-3", "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    resumed = made(library)
    resumed.args.output_dir = run.args.output_dir
    resumed.train(resume_from_checkpoint=True)
    return resumed, bytes(content)


def test_a_damaged_checkpoint_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    theirs, damaged = resumed_from_damaged("trl")
    assert Path(theirs.args.output_dir, "checkpoint-3", "model.safetensors").read_bytes() == damaged
    caplog.clear()
    ours, damaged = resumed_from_damaged("prefopt")
    assert "checkpoint-3 is damaged and passed over: model.safetensors was changed" in caplog.text
    assert Path(ours.args.output_dir, "checkpoint-3", "model.safetensors").read_bytes() != damaged  # trained again


def test_resuming_where_nothing_is_begins() -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        made("trl").train(resume_from_checkpoint=True)
    ours = made("prefopt")
    ours.train(resume_from_checkpoint=True)
    assert ours.state.global_step == 3


@pytest.mark.parametrize("library", ["trl", "prefopt"])
def test_a_failed_save_leaves_no_part(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the state of the trainer is written, behind everything else."""
    run = made(library)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.trainer_callback.TrainerState.save_to_json", full)
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        run.train()
    partial = list(Path(run.args.output_dir).glob("*checkpoint-*"))
    assert bool(partial) == (library == "trl")


def test_a_checkpoint_vouches_for_its_files() -> None:
    """And a run holds its folder, so that no second one writes there."""
    for library in ("trl", "prefopt"):
        run = made(library)
        run.train()
        folder = Path(run.args.output_dir)
        assert (folder / LOCK).exists() == (library == "prefopt")
        manifest = folder / "checkpoint-3" / "manifest.json"
        assert manifest.exists() == (library == "prefopt")
    assert "model.safetensors" in json.loads(manifest.read_text())["files"]
