"""A checkpoint with a file that is cut, missing, changed by one bit or empty is noticed, named and passed over."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

import pytest
import torch
from peft import LoraConfig
from short_runs import dataset, log_rows, trainer, weights
from transformers import TrainerCallback
from worlds import start_world

from prefopt.checkpoints.manifest import MANIFEST, faults, write_manifest
from prefopt.trainer.saving.resuming import chosen_checkpoint

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "tr-dpo": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}
OPTIONS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
DAMAGES = ["cut", "missing", "one bit", "empty"]
GOOD, NEWEST = 2, 3
"""The steps of two checkpoints, of which the newest one is damaged."""


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp(request.param), **OPTIONS, **KINDS[request.param])
    made.train()
    made.kind = request.param
    return made


def copied(run: Any, into: Path) -> Path:
    """The run's folder once more; a file is replaced there, not written to."""
    return shutil.copytree(run.args.output_dir, into, copy_function=os.link)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "missing":
        return
    if how == "one bit":
        content[len(content) // 2] ^= 1 << (len(content) % 8)
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(how, content))


def test_every_damage_is_noticed(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, figure: Callable[[str, str], None]
) -> None:
    """Every file of a checkpoint in every way: the file is named, the checkpoint passed over, the one before taken."""
    newest = Path(run.args.output_dir, f"checkpoint-{NEWEST}")
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    cases = [
        (name, how) for name in names for how in DAMAGES if newest.joinpath(name).stat().st_size or how == "missing"
    ]
    for number, (name, how) in enumerate(cases):
        folder = copied(run, tmp_path / str(number))
        damage(folder / f"checkpoint-{NEWEST}" / name, how)
        caplog.clear()
        assert chosen_checkpoint(run.args, True, folder) == str(folder / f"checkpoint-{GOOD}"), (name, how)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 1, (name, how)
        assert f"checkpoint-{NEWEST} is damaged" in said[0], (name, how)
        assert str(name) in said[0], (name, how)
        with pytest.raises(ValueError, match=str(name)):
            chosen_checkpoint(run.args, str(folder / f"checkpoint-{NEWEST}"), folder)
        shutil.rmtree(folder)
    assert len(cases) > 60
    figure("damaged checkpoint", f"{run.kind}: {len(cases)} damages of {len(names)} files: all noticed and named")


def test_the_run_goes_on_from_the_one_before(run: Any, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    damage(folder / f"checkpoint-{NEWEST}" / "trainer_state.json", "cut")
    resumed = trainer(folder, **OPTIONS, **KINDS[run.kind])
    resumed.train("true")
    assert torch.equal(weights(resumed.model), weights(run.model))
    assert log_rows(resumed) == log_rows(run)
    assert not faults(folder / f"checkpoint-{NEWEST}")  # written anew


# -- what `resume_from_checkpoint` may be ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("saved"), **{**OPTIONS, "max_steps": 2})
    made.train()
    return made


@pytest.mark.parametrize("given", [True, "true", "True"], ids=str)
def test_a_run_without_checkpoints_begins(given: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A queue starts a run with `--resume_from_checkpoint true` always, the first time too."""
    with caplog.at_level(logging.INFO, "prefopt"):
        run = trainer(tmp_path, max_steps=1)
        run.train(resume_from_checkpoint=given)
    assert run.state.global_step == 1
    assert f"{tmp_path} has no checkpoint yet: the run begins." in caplog.text


@pytest.mark.parametrize("given", [None, False, "false"], ids=str)
def test_nothing_is_continued_unasked(given: Any, saved: Any) -> None:
    assert chosen_checkpoint(saved.args, given, Path(saved.args.output_dir)) is None


def test_names_of_checkpoints(saved: Any, tmp_path: Path) -> None:
    """A folder; its name in the run's folder; a run's folder, which means its newest good one."""
    folder = copied(saved, tmp_path / "run")
    shutil.copytree(folder / "checkpoint-2", folder / "last-checkpoint")
    for given, found in {
        str(folder / "checkpoint-1"): "checkpoint-1",
        "checkpoint-1": "checkpoint-1",
        "last-checkpoint": "last-checkpoint",
        str(folder): "checkpoint-2",
    }.items():
        assert chosen_checkpoint(saved.args, given, folder) == str(folder / found), given
    assert chosen_checkpoint(saved.args, folder / "checkpoint-1", folder) == str(folder / "checkpoint-1")
    saved.state.save_to_json(str(folder / "trainer_state.json"))  # as `save_state` does
    assert chosen_checkpoint(saved.args, str(folder), folder) == str(folder / "checkpoint-2")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere cannot be gone on from: there is no such folder"):
        chosen_checkpoint(saved.args, "nowhere", folder)
    with pytest.raises(ValueError, match=r"empty.*manifest\.json is missing"):
        chosen_checkpoint(saved.args, "empty", folder)


def test_no_good_one_is_an_error_with_all_of_them(saved: Any, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "run")
    damage(folder / "checkpoint-1" / "model.safetensors", "cut")
    damage(folder / "checkpoint-2" / "scheduler.json", "missing")
    with pytest.raises(
        ValueError, match=r"(?s)checkpoint-2: scheduler\.json is missing.*checkpoint-1: model\.safe.* cut"
    ):
        trainer(folder, **OPTIONS).train(True)


def test_a_manifest_of_a_later_version_is_no_damage(saved: Any, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "run") / "checkpoint-2"
    (folder / MANIFEST).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.checkpoints.manifest.FORMAT", 2)
        write_manifest(folder, 2)
    assert faults(folder) == ["manifest.json is damaged (format 2 with xxh3_128: it was written by another version)"]


def test_a_trials_checkpoint_is_good(saved: Any, tmp_path: Path) -> None:
    """Ray has a folder of its own for what a trial saves."""
    saved._tune_save_checkpoint(str(tmp_path))
    assert chosen_checkpoint(saved.args, str(tmp_path / "checkpoint-2"), tmp_path) == str(tmp_path / "checkpoint-2")


def node(folder: Path, steps: int) -> None:
    """One of two processes, each on a node with a disk of its own."""
    rank, os.environ["LOCAL_RANK"] = os.environ["RANK"], "0"
    run = trainer(folder / rank, use_cpu=True, save_on_each_node=True, **{**OPTIONS, "max_steps": steps})
    found = chosen_checkpoint(run.args, True, folder / rank)
    run.train(True)
    (folder / f"{rank}-{steps}").write_text(str(found))


def test_nodes_agree_on_what_is_whole_on_all_of_them(tmp_path: Path) -> None:
    start_world(2, tmp_path, node, tmp_path, 2).finish()
    for rank in "01":
        assert not faults(tmp_path / rank / "checkpoint-2")
    damage(tmp_path / "1" / "checkpoint-2" / "model.safetensors", "cut")
    start_world(2, tmp_path, node, tmp_path, 3).finish()
    assert [(tmp_path / f"{rank}-3").read_text() for rank in "01"] == [
        str(tmp_path / rank / "checkpoint-1") for rank in "01"
    ]
    for rank in "01":
        assert not faults(tmp_path / rank / "checkpoint-3")


def test_other_files_are_no_fault(saved: Any, tmp_path: Path) -> None:
    """A note that someone lays into a checkpoint does not spoil it."""
    folder = copied(saved, tmp_path / "run") / "checkpoint-2"
    (folder / "notes.txt").write_text("the good one")
    assert not faults(folder)


def test_a_damaged_best_model_is_not_loaded(tmp_path: Path) -> None:
    """It is looked at again when it is to be loaded."""

    class Damages(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == OPTIONS["max_steps"]:
                damage(Path(state.best_model_checkpoint, "model.safetensors"), "one bit")

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": dataset(4)}
    run = trainer(tmp_path, callbacks=[Damages()], **best, **OPTIONS)
    with pytest.raises(ValueError, match=r"best checkpoint, .*, is damaged: model\.safetensors was changed"):
        run.train()
