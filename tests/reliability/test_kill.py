"""A run that is killed at any moment goes on from a good checkpoint, and ends as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

import pytest
import torch
from disk_states import DiskStates, newest_good
from processes import start
from scale import scaled
from short_runs import log_rows, trainer, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from worlds import start_world

from prefopt.checkpoints.folder import FolderInUseError, checkpoints_in, held
from prefopt.checkpoints.manifest import MANIFEST, faults
from prefopt.files import Operation, observed

STEPS = 4
OPTIONS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "disable_dropout": False}
LOOP_STEPS, INTERVAL = 20, 2
"""Steps of a run that is killed at random moments, and between its saves."""
LONGEST = 0.6
"""Seconds between the first step of a process and its end."""
LIMIT = 60.0
"""Seconds that a process may take to come to its first step."""

Result = tuple[torch.Tensor, list[dict[str, float]]]


class Saves(TrainerCallback):
    """Notes the step of the last save that was done."""

    last = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = state.global_step


class Diary(TrainerCallback):
    """Writes down each step before it is saved, and at the end what the run has come to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{state.global_step}\n")

    def steps(self) -> list[int]:
        return [int(line) for line in self.path.read_text().split()] if self.path.is_file() else []


def result(run: Any) -> Result:
    return weights(run.model), log_rows(run)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    run = trainer(tmp_path_factory.mktemp("uninterrupted"), **OPTIONS)
    run.train()
    return result(run)


# -- at each operation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2])
def test_every_operation_may_be_the_last(
    limit: int, tmp_path: Path, uninterrupted: Result, figure: Callable[[str, str], None]
) -> None:
    """Before each write, sync, rename and removal of a run: killed there, or the machine crashed there."""
    saves = Saves()
    disk = DiskStates(tmp_path / "run", tmp_path, lambda: saves.last)
    run = trainer(tmp_path / "run", save_total_limit=limit, callbacks=[saves], **OPTIONS)
    with observed(disk):
        run.train()
    assert saves.last == STEPS
    for what, folder, saved in disk.states:
        whole = [step for step, path in checkpoints_in(folder).items() if not faults(path)]
        assert len(whole) == len(checkpoints_in(folder)), f"{what}: a part has the name of a checkpoint"
        assert newest_good(folder) >= saved, what
        assert not any(path.name.startswith("_checkpoint") for path in folder.iterdir()), what
    for what, folder, _ in random.Random(limit).sample(disk.states, scaled(2, len(disk.states))):
        resumed = trainer(folder, save_total_limit=limit, **OPTIONS)
        resumed.train(True)
        assert_same(result(resumed), uninterrupted, what)
        assert len(checkpoints_in(folder)) <= limit, what
    figure(
        "kill -9", f"{len(disk.states)} states of the disk, save_total_limit={limit}: 0 unusable, 0 saved steps lost"
    )


def test_the_same_step_is_saved_again_without_a_gap(tmp_path: Path) -> None:
    """A checkpoint is replaced by one of the same name: at each operation the old or the new one is there."""
    folder = tmp_path / "run"
    run = trainer(folder, **{**OPTIONS, "max_steps": 1})
    run.train()
    disk = DiskStates(folder, tmp_path, lambda: 1)
    with observed(disk):
        run._save_checkpoint(run.model, None)
    assert any("rename" in what for what, _, _ in disk.states)
    for what, state, _ in disk.states:
        assert newest_good(state) == 1, what
    assert newest_good(folder) == 1


def test_what_is_synced_before_what(tmp_path: Path) -> None:
    """Every file, then the manifest, then the name, then older ones go; all of it made last in that order."""
    operations: list[tuple[Operation, Path]] = []
    run = trainer(tmp_path, save_total_limit=1, **{**OPTIONS, "max_steps": 2})
    with observed(lambda operation, path: operations.append((operation, path))):
        run.train()
    staged, final = tmp_path / "_checkpoint-2.writing", tmp_path / "checkpoint-2"
    manifest, named = operations.index(("write", staged / MANIFEST)), operations.index(("rename", final))
    files = {staged / path.relative_to(final) for path in final.rglob("*") if path.name != MANIFEST}
    assert len(files) > 10
    for path in files:
        assert path in {found for operation, found in operations[:manifest] if operation == "sync"}, path
    assert manifest < operations.index(("sync", staged / MANIFEST)) < named
    assert ("sync", staged) in operations[manifest:named]
    assert operations[named + 1] == ("sync", tmp_path)
    assert operations.index(("remove", tmp_path / "_checkpoint-1.removed")) > named


# -- processes ---------------------------------------------------------------------------------------------------


def train(folder: Path, limit: int) -> None:
    """A process of the loop: goes on from what is there."""
    options = {**OPTIONS, "max_steps": LOOP_STEPS, "save_steps": INTERVAL, "save_total_limit": limit}
    run = trainer(folder, callbacks=[Diary(folder.with_suffix(".steps"))], **options)
    run.train("true")
    torch.save(result(run), folder.with_suffix(".result"))


def begun(process: Any, diary: Diary, before: int) -> bool:
    """Wait until a process has made a step; whether it has."""
    until = time.monotonic() + LIMIT
    while process.is_alive() and len(diary.steps()) == before and time.monotonic() < until:
        time.sleep(0.002)
    return len(diary.steps()) > before


def test_kill_9_at_random_moments(tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    """A run that is started again whenever it is killed, as a queue does, ends with the numbers of one that was not."""
    wanted, chance = scaled(3, 500), random.Random(0)
    whole, kills, lost, ends = start(train, tmp_path / "whole", 1), 0, 0, []
    while kills < wanted or not ends:
        folder = tmp_path / f"killed-{len(ends)}"
        diary = Diary(folder.with_suffix(".steps"))
        process, before = start(train, folder, 1 + kills % 2), len(diary.steps())
        if kills < wanted and begun(process, diary, before):
            time.sleep(chance.uniform(0, LONGEST))
            process.kill()
        process.join()
        if process.exitcode == 0:
            ends.append(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        lost = max(lost, diary.steps()[-1] - newest_good(folder))
        assert lost <= INTERVAL, f"kill {kills}"
    whole.join()
    for folder in ends:
        assert_same(*(torch.load(path.with_suffix(".result")) for path in (folder, tmp_path / "whole")), folder.name)
    figure(
        "kill -9",
        f"{kills} at random moments, in {len(ends)} runs: 0 unusable, at most {lost} steps lost of {INTERVAL}",
    )


def rank_that_dies(folder: Path, doomed: int, number: int) -> None:
    """A rank of two, of which one kills itself before its operation of this number after the first save."""
    saves, count = Saves(), 0

    def observer(operation: Operation, path: Path) -> None:
        nonlocal count
        count += saves.last > 0 and int(os.environ["RANK"]) == doomed
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with observed(observer):
        two_ranks(folder, saves)


def two_ranks(folder: Path, *callbacks: TrainerCallback) -> None:
    run = trainer(folder, callbacks=list(callbacks), use_cpu=True, save_total_limit=1, **OPTIONS)
    run.train(True)
    if run.is_world_process_zero():
        torch.save(result(run), folder.with_suffix(".result"))


MOMENTS = [
    (0, 30),
    (1, 2),
    *((rank, number) for number in range(1, 60, 6) for rank in (0, 1) if rank == 0 or number < 7),
]
"""Which rank dies before which of its operations."""


def test_one_of_two_ranks_is_killed(tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    start_world(2, tmp_path, two_ranks, tmp_path / "whole").finish()
    moments = MOMENTS[: scaled(2, len(MOMENTS))]
    for moment in moments:
        folder = tmp_path / "_".join(map(str, moment))
        world = start_world(2, tmp_path, rank_that_dies, folder, *moment)
        world.ranks[moment[0]].join(LIMIT)
        world.kill()
        assert world.ranks[moment[0]].exitcode == -signal.SIGKILL, moment
        assert newest_good(folder) >= 1, moment
    start_world(2, tmp_path, two_ranks, folder).finish()
    whole, resumed = (torch.load(path.with_suffix(".result")) for path in (tmp_path / "whole", folder))
    assert_same(resumed, whole, "two ranks")
    figure("kill -9", f"{len(moments)} kills of one of two ranks in a save: 0 unusable")


# -- the folder --------------------------------------------------------------------------------------------------


def hold(folder: Path, seconds: float) -> None:
    with held(folder):
        (folder / "held").touch()
        time.sleep(seconds)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    other = start(hold, tmp_path, LIMIT)
    while not (tmp_path / "held").exists():
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(FolderInUseError, match=f"process {other.pid} on .* another `output_dir`"):
        trainer(tmp_path, **OPTIONS).train()
    other.kill()
    other.join()
    trainer(tmp_path, **{**OPTIONS, "max_steps": 1}).train()  # a lock dies with its process
    assert newest_good(tmp_path) == 1


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    """Of all checkpoints with a limit of two; at the end, with a limit of one, the best."""
    run = trainer(tmp_path, save_total_limit=2, **OPTIONS)
    run.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    keep = run.kept

    class Best(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.best_model_checkpoint = str(tmp_path / "checkpoint-1")

    run.add_callback(Best)
    run.train()
    assert list(checkpoints_in(tmp_path)) == [STEPS, 1]
    assert {path.name for path in keep()} == {"checkpoint-1"}
    run.args.save_total_limit = 1
    run._finalize_training(None, 0, 0.0)
    assert list(checkpoints_in(tmp_path)) == [1]


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    """A limit of two keeps two good ones, whatever else is there."""
    trainer(tmp_path, **{**OPTIONS, "max_steps": 3}).train()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    last = {**OPTIONS, "max_steps": 4, "save_steps": 4, "save_total_limit": 2}
    trainer(tmp_path, **last).train(str(tmp_path / "checkpoint-2"))
    assert list(checkpoints_in(tmp_path)) == [4, 3, 2]
    assert [step for step, folder in checkpoints_in(tmp_path).items() if not faults(folder)] == [4, 2]


def test_what_is_pushed_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub gets a checkpoint by its final name, whole."""
    pushed: list[str] = []
    run = trainer(tmp_path, **{**OPTIONS, "max_steps": 2})
    run.args.push_to_hub = True
    monkeypatch.setattr(
        run, "_push_from_checkpoint", lambda folder: pushed.append(folder) or faults(folder) == [] or 1 / 0
    )
    run.train()
    assert pushed == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]


def test_others_read_it(tmp_path: Path) -> None:
    """`get_last_checkpoint` finds it, though a part of another lies beside it; `from_pretrained` reads it."""
    run = trainer(tmp_path, save_only_model=True, **{**OPTIONS, "max_steps": 2})
    run.train()
    (tmp_path / "_checkpoint-3.writing").mkdir()
    found = get_last_checkpoint(str(tmp_path))
    assert found == str(tmp_path / "checkpoint-2")
    assert not faults(found)
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(found)), weights(run.model))


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
def test_a_model_is_replaced_by_a_whole_one(sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_model` into a folder with a model: at each operation the old, the new, or none that could be loaded."""
    run = trainer(tmp_path / "run", max_steps=1)
    if sharded:
        save = type(run.model).save_pretrained
        monkeypatch.setattr(
            type(run.model),
            "save_pretrained",
            lambda self, *args, **options: save(self, *args, max_shard_size="20KB", **options),
        )
    folder = tmp_path / "run" / "model"
    run.save_model(str(folder))
    old = weights(run.model)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    disk = DiskStates(folder, tmp_path, lambda: 0)
    with observed(disk):
        run.save_model(str(folder))
    seen = set()
    for what, state, _ in disk.states[:: 1 if not sharded else 4]:
        try:
            found = weights(AutoModelForCausalLM.from_pretrained(state))
        except OSError:
            seen.add("none")
            continue
        kind = "old" if torch.equal(found, old) else "new" if torch.equal(found, weights(run.model)) else "mixed"
        assert kind != "mixed", what
        seen.add(kind)
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(run.model))
    assert {"old"} <= seen <= ({"old", "new", "none"} if sharded else {"old", "new"})
    assert not any(path.name.startswith("_") for path in folder.iterdir())


def assert_same(ours: Result, theirs: Result, what: str) -> None:
    assert torch.equal(ours[0], theirs[0]), what
    assert ours[1] == theirs[1], what
