"""A disk that is full: nothing partial stays, the last good checkpoint does, the message says what to do."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disk_states import newest_good, newest_whole
from processes import start
from scale import scaled
from short_runs import log_rows, trainer, weights

from prefopt.checkpoints.folder import staging_folder
from prefopt.checkpoints.space import checkpoint_bytes, folder_bytes
from prefopt.files import Operation, observed
from prefopt.trainer.saving.checkpointing import CheckpointingTrainer, CheckpointNotWrittenError

OPTIONS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
MESSAGE = (
    r"Step 2: the checkpoint could not be written to .*checkpoint-2: .* are free there\. "
    r".* the last good checkpoint is .*checkpoint-1\. .* go on with `resume_from_checkpoint=True`"
)
TMPFS_BYTES = 1 << 23
"""Room for many checkpoints of the tiny model."""
RENAMES = 4
"""Operations at the end of a save that replaces one: two renames, and the sync of the folder after each."""
PAGE = 4096
"""Bytes that a file takes at least."""
LIMIT_BYTES = 60_000
"""Less than the file of the tiny model's weights."""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["full", "quota", "broken"])
@pytest.mark.parametrize("step", [1, 2], ids=["again", "next"])
def test_every_operation_may_fail(step: int, number: int, tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    """Each write, sync and rename of a save in turn: of the step that is there already, and of the next one."""
    run = trainer(tmp_path, **{**OPTIONS, "max_steps": 1})
    run.train()
    run.state.global_step = 1
    total = operations_of(run)
    run.state.global_step = step
    stride = 1 if (number, step) == (errno.ENOSPC, 2) else scaled(12, 1)
    doomed = sorted({*range(0, total, stride), *range(total - RENAMES, total)})
    if step == 2:
        doomed = [place for place in doomed if place < total - RENAMES]  # no old one is set aside
    for place in doomed:
        with pytest.raises(CheckpointNotWrittenError, match=os.strerror(number)):
            operations_of(run, place, number)
        assert newest_whole(tmp_path) == 1, place
        assert not list(tmp_path.glob("_checkpoint*")), place
    operations_of(run)
    assert newest_good(tmp_path) == step
    figure(
        "disk full", f"{os.strerror(number)} at {len(doomed)} of {total} operations: nothing partial, last good kept"
    )


def operations_of(run: Any, doomed: int | None = None, number: int = 0) -> int:
    """Save, with the operation at this place failing (a removal never does); how many there were."""
    operations = 0

    def observer(operation: Operation, path: Path) -> None:
        nonlocal operations
        if operation != "remove":
            operations += 1
            if doomed is not None and operations == doomed + 1:
                raise OSError(number, os.strerror(number), str(path))

    with observed(observer):
        CheckpointingTrainer._save_checkpoint(run, run.model, None)  # without the log's files
    return operations


# -- real ones ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by the administrator only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(small_disk: Path, tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    """A tmpfs that holds two checkpoints and not three; with room made, the run goes on as if nothing had been."""
    run, whole = trainer(small_disk / "run", **OPTIONS), trainer(tmp_path / "whole", **OPTIONS)
    whole.train()
    files = [path for path in (tmp_path / "whole" / "checkpoint-1").rglob("*") if path.is_file()]
    size = folder_bytes(tmp_path / "whole" / "checkpoint-1") + len(files) * PAGE
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - int(2.6 * size)))  # room for two
    with pytest.raises(CheckpointNotWrittenError, match=r"No space left on device.*resume_from_checkpoint=True"):
        run.train()
    step = newest_good(small_disk / "run")
    assert step >= 1
    filler.unlink()
    resumed = trainer(small_disk / "run", save_total_limit=1, **OPTIONS)
    resumed.train(True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_rows(resumed) == log_rows(whole)
    figure("disk full", f"a tmpfs with room for two: stopped after step {step}, exact once there was room")


def limited(folder: Path) -> None:
    """Goes on with a limit on the size of a file, which every library meets in its own way."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    run = trainer(folder, **{**OPTIONS, "max_steps": 2})
    with pytest.raises(CheckpointNotWrittenError, match=MESSAGE):
        run.train(True)


def test_a_library_cannot_write(tmp_path: Path) -> None:
    """What safetensors raises is no OSError."""
    trainer(tmp_path, **{**OPTIONS, "max_steps": 1}).train()
    process = start(limited, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert newest_good(tmp_path) == 1
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-1"}


def test_a_disk_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks let nobody change the mode of a file."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", refused)
    trainer(tmp_path, **{**OPTIONS, "max_steps": 1}).train()
    assert newest_good(tmp_path) == 1


def test_only_the_rank_that_saves_puts_in_order(tmp_path: Path) -> None:
    """Another rank that fails in a save leaves the folder to it."""
    run = trainer(tmp_path, **OPTIONS)
    staging = staging_folder(tmp_path, 1)
    staging.mkdir(parents=True)
    run.args = SimpleNamespace(should_save=False)
    with pytest.raises(MemoryError), run.whole_or_not_at_all(tmp_path, 1):
        raise MemoryError
    assert staging.is_dir()


# -- before the first step ---------------------------------------------------------------------------------------


def fake_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))


@pytest.mark.parametrize(("options", "factor"), [({}, 1.9), ({"save_steps": 4}, 0.9)], ids=["two", "one"])
def test_free_space_is_checked_before_the_first_step(
    options: dict[str, Any], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two checkpoints, one beside the one that must stay; for one where only one is written."""
    run = trainer(tmp_path, **{**OPTIONS, **options})
    one = checkpoint_bytes(run.model, "adamw", [], adapter=False)
    fake_disk(monkeypatch, int(factor * one))
    with pytest.raises(OSError, match=r"has .* KiB free, and a checkpoint takes at least .* KiB.*Nothing was trained"):
        run.train()
    assert run.state.global_step == 0
    fake_disk(monkeypatch, int((factor + 0.2) * one))
    trainer(tmp_path, **{**OPTIONS, **options}).train()


def test_space_is_no_matter_where_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 0)
    trainer(tmp_path, max_steps=1).train()


@pytest.mark.parametrize(
    "options",
    [{}, {"optim": "sgd"}, {"optim": "adafactor"}, {"save_only_model": True}, {"sync_ref_model": True}],
    ids=["adamw", "sgd", "adafactor", "model", "tr-dpo"],
)
def test_the_estimate_is_no_more_than_what_is_written(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimate above would refuse runs that have the room."""
    run = trainer(tmp_path, **{**OPTIONS, "max_steps": 1}, **options)
    run.train()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*.safetensors"))
    optimizer = None if run.args.save_only_model else type(run.optimizer.optimizer).__name__
    estimate = checkpoint_bytes(run.model, optimizer, run.weights_beside(), adapter=False)
    assert 0.8 * written < estimate <= written


def test_the_estimate_of_small_states() -> None:
    """Two values for each weight of 4 bytes, in 8 or in 4 bits."""
    model = torch.nn.Linear(8, 8, bias=False)
    sizes = {name: checkpoint_bytes(model, name, [], adapter=False) for name in ("AdamW", "AdamW8bit", "AdamW4bit")}
    assert sizes == {"AdamW": 256 + 512, "AdamW8bit": 256 + 128, "AdamW4bit": 256 + 64}
