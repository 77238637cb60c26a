"""Ten thousand steps, and many trainers in one process: what a process holds does not grow with what it has done.

By design ``state.log_history`` grows, a row of about 30 numbers for each that was logged, of which transformers writes
all with every checkpoint; and on the disk ``metrics.jsonl``, ``samples.jsonl`` and trackers. The first is emptied
before each reading.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import random
import signal
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from processes import start
from scale import scaled
from short_runs import trainer
from tiny_models import FIRST_WORD, text, tiny_model
from transformers import TrainerCallback

EPOCH = scaled(10, 25)
"""Steps of an epoch; evaluations and checkpoints come as often, so that every reading finds the same state."""
STEPS = scaled(100, 10_000)
WITH_WORKERS = scaled(100, 3_000)
"""Steps of the runs whose loaders have workers, which begin anew with every evaluation."""
WARM = scaled(3, 40)
"""Readings before the first that counts: caches fill, and allocators find their size."""
MOST_MEMORY = 0.01
"""Growth of the resident memory after the warm-up, relative."""
MOST_OBJECTS = 500
"""Growth of the number of objects that Python's collector follows: the last step may have had more micro-batches. One
object left by every step would be 9,000."""
MOST_BLOCKS = scaled(30.0, 0.5)
"""Growth of the number of Python's memory blocks, a step. The plainest loop of torch over rows of many lengths has 3 a
step at first and 0.1 after 500 steps; what workers have ready at a reading is up to 500, more or less."""
PAIRS = 4
TRAINERS = scaled(5, 60)
TRIALS = scaled(4, 40)


@dataclass(frozen=True)
class Held:
    """What the process has."""

    memory: int
    """Resident, bytes."""
    blocks: int
    """Of Python's allocator: objects of every type."""
    objects: int
    """Followed by Python's collector: no numbers and strings."""
    tensors: int
    files: int
    threads: int
    children: int
    handlers: int
    """Of logging, of signals that are not the system's, and to be called at the end of the process."""


def held() -> Held:
    gc.collect()
    process = psutil.Process()
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    caught = (signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN) for number in signal.valid_signals())
    return Held(
        memory=process.memory_info().rss,
        blocks=sys.getallocatedblocks(),
        objects=len(gc.get_objects()),
        tensors=sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()),
        files=process.num_fds(),
        threads=process.num_threads(),
        children=len(process.children()),
        handlers=sum(len(logger.handlers) for logger in loggers) + sum(caught) + atexit._ncallbacks(),
    )


class Reading(TrainerCallback):
    """Reads at the end of every epoch, before what is evaluated and saved there."""

    def __init__(self) -> None:
        self.found: list[Held] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EPOCH == 0:
            state.log_history.clear()
            self.found.append(held())


def rows(count: int, seed: int = 0) -> Dataset:
    """Of many lengths: up to 150 tokens a sequence."""
    rng = random.Random(seed)
    columns = {"prompt": [text(rng, 2, 70) for _ in range(count)]}
    for column, first in FIRST_WORD.items():
        columns[column] = [f" {first} {text(rng, 1, 70)}" for _ in range(count)]
    return Dataset.from_dict(columns)


RUNS: dict[str, dict[str, Any]] = {
    "dpo, reference remembered, samples": {
        "generate_during_eval": True,
        "num_eval_samples": 2,
        "eval_sample_tokens": 4,
    },
    "dpo, LoRA, packed by tokens, moving reference, workers": {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "layout": "packed",
        "tokens_per_batch": 400,
        "sync_ref_model": True,
        "ref_model_sync_steps": 5,
        "dataloader_num_workers": 2,
        "max_steps": WITH_WORKERS,
    },
    "tpo, padded, a stream, workers": {
        "method": "tpo",
        "layout": "padded",
        "stream": True,
        "dataloader_num_workers": 2,
        "max_steps": WITH_WORKERS,
    },
}


def long_run(folder: str, name: str) -> None:
    """A run of ``RUNS``, in a process of its own."""
    torch.set_num_threads(1)
    os.environ["PREFOPT_CACHE"] = str(Path(folder, "cache"))
    options = {"max_steps": STEPS, **RUNS[name]}
    data = rows(EPOCH * PAIRS)
    reading = Reading()
    run = trainer(
        Path(folder, "run"),
        rows=data.to_iterable_dataset() if options.pop("stream", False) else data,
        eval_dataset=rows(2 * PAIRS, seed=1),
        callbacks=[reading],
        learning_rate=1e-4,
        per_device_train_batch_size=PAIRS,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=EPOCH,
        save_strategy="steps",
        save_steps=EPOCH,
        save_total_limit=2,
        **options,
    )
    run.train()
    write(folder, reading.found)


def write(folder: str, found: Sequence[Held]) -> None:
    Path(folder, "held.json").write_text(json.dumps([asdict(one) for one in found]))


def readings(target: Callable[..., None], folder: Path, *args: Any) -> list[Held]:
    """What ``target`` wrote, in a process of its own."""
    process = start(target, str(folder), *args)
    process.join()
    assert process.exitcode == 0
    return [Held(**one) for one in json.loads((folder / "held.json").read_text())]


def growth(found: Sequence[Held]) -> Mapping[str, float]:
    """Of each number, the median of the last half less that of the first."""
    half = len(found) // 2

    def between(field: str) -> float:
        first, last = ([getattr(one, field) for one in part] for part in (found[:half], found[-half:]))
        return median(last) - median(first)

    return {field: between(field) for field in asdict(found[0])}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_holds_at_its_end_what_it_held_at_its_beginning(
    name: str, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    found = readings(long_run, tmp_path, name)
    total = RUNS[name].get("max_steps", STEPS)
    assert len(found) == total // EPOCH
    counted = found[WARM:]
    grown = growth(counted)
    memory, steps = counted[-1].memory / counted[0].memory - 1, (len(counted) - 1) * EPOCH
    now = counted[-1]
    figure(
        f"soak: {name}",
        f"{total} steps: memory {memory:+.2%} of {counted[0].memory >> 20} MiB, objects {grown['objects']:+.0f}, "
        f"tensors {grown['tensors']:+.0f}, files {grown['files']:+.0f} of {now.files}, "
        f"threads {grown['threads']:+.0f} of {now.threads}, processes {grown['children']:+.0f} of {1 + now.children}",
    )
    assert memory < MOST_MEMORY
    assert grown["objects"] < MOST_OBJECTS
    assert grown["blocks"] / (steps / 2) < MOST_BLOCKS
    for field in ("tensors", "files", "threads", "children", "handlers"):
        assert grown[field] == 0, (field, counted)


def many_trainers(folder: str) -> None:
    """Runs of all kinds, one after another, each with an evaluation and checkpoints."""
    torch.set_num_threads(1)
    kinds: list[dict[str, Any]] = [
        {"method": "dpo", "peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
        {"method": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "dataloader_num_workers": 1},
        {"method": "tpo", "layout": "padded"},
    ]
    data, found = rows(12), []
    common: dict[str, Any] = {"max_steps": 2, "eval_dataset": rows(PAIRS, seed=1), "save_strategy": "steps"}
    for number in range(TRAINERS):
        for kind in kinds:
            run = trainer(Path(folder, f"run{number % 2}"), rows=data, **common, save_steps=1, **kind)
            run.train()
            run.evaluate()
            model = weakref.ref(run.model)
            del run
            gc.collect()
            assert model() is None, kind
        found.append(held())
    write(folder, found)


def test_trainers_leave_nothing_in_the_process(tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    counted = readings(many_trainers, tmp_path)[2:]
    grown = growth(counted)
    memory = counted[-1].memory / counted[0].memory - 1
    figure(
        "soak: trainers in one process",
        f"{3 * TRAINERS} runs: memory {memory:+.2%}, objects {grown['objects']:+.0f}; no tensor, file, thread, process "
        "or handler is left",
    )
    assert memory < scaled(0.05, MOST_MEMORY)  # the allocator still grows; a model that is left is seen above
    assert grown["objects"] < MOST_OBJECTS
    for field in ("tensors", "files", "threads", "children", "handlers"):
        assert grown[field] == 0, (field, counted)


def search(folder: str) -> None:
    """A search, which makes a model for each trial."""
    import optuna

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made: list[Any] = []
    alive: list[int] = []
    found: list[Held] = []

    def model() -> Any:
        found.append(held())
        alive.append(sum(one() is not None for one in made))
        fresh = tiny_model(seed=1)
        made.append(weakref.ref(fresh))
        return fresh

    run = trainer(Path(folder, "run"), model_init=model, eval_dataset=rows(PAIRS, seed=1), max_steps=2)
    run.hyperparameter_search(
        hp_space=lambda trial: {"beta": trial.suggest_float("beta", 0.1, 0.2)},
        n_trials=TRIALS,
        backend="optuna",
        direction="minimize",
    )
    assert max(alive) <= 1, alive
    write(folder, found)


def test_trials_of_a_search_leave_nothing(tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    pytest.importorskip("optuna")
    counted = readings(search, tmp_path)[2:]
    grown = growth(counted)
    figure(
        "soak: trials of a search",
        f"{TRIALS} trials: at most one model at a time, tensors {grown['tensors']:+.0f}, files {grown['files']:+.0f}, "
        f"threads {grown['threads']:+.0f}",
    )
    for field in ("tensors", "files", "threads", "children", "handlers"):
        assert grown[field] == 0, (field, counted)
