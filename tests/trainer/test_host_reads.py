"""A training step waits for the device as often with many micro-batches as with one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

READS = {
    "_local_scalar_dense",  # item, int(), float(), if tensor
    "is_nonzero",
    "equal",
    "nonzero",  # and boolean indices
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
    "histc",
    "bincount",
}
"""Operators whose result, or its size, the host must know before it goes on."""
CPU_CODE = ("scoring/head/torch_rows.py", "trainer/loader.py")
"""Runs on a CPU in place of the CUDA kernel, or makes batches on the host: may look at values, which costs nothing."""
COPIES = ("tolist", "numpy", "__array__", "cpu")
"""Methods of tensors that copy to the host."""


class HostReads(TorchDispatchMode):
    """Counts the operators of `READS`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS and not called_by(CPU_CODE):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def called_by(files: tuple[str, ...]) -> bool:
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_filename.endswith(files):
            return True
    return False


@contextmanager
def counted_copies(monkeypatch: pytest.MonkeyPatch, count: Counter[str]) -> Iterator[None]:
    """Counts calls of `COPIES`, which do not pass by a dispatch mode on the CPU."""
    with monkeypatch.context() as patch:
        for name in COPIES:
            original = getattr(torch.Tensor, name)

            def copying(tensor: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                count[name] += 1
                return original(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, copying)
        yield


class PerStep(TrainerCallback):
    """What was counted in each step, from its first micro-batch until the next step begins."""

    def __init__(self) -> None:
        self.reads = HostReads()
        self.steps: list[Counter[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(Counter(self.reads.count))
        self.reads.count.clear()


def reads(folder: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, **options: Any) -> Counter[str]:
    """Of the third step; the first ones may look at things once."""
    steps = PerStep()
    run = trainer(
        folder,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=100,
        callbacks=[steps],
        use_cpu=True,
        **options,
    )
    with steps.reads, counted_copies(monkeypatch, steps.reads.count):
        run.train()
    return steps.steps[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "packed"},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.1, 0.1], "ld_alpha": 0.5},
        {"loss_type": "bco_pair", "bco_shift": True, "use_weighting": True},
        {"method": "cpo", "loss_type": "simpo"},
        {"method": "tpo"},
    ],
    ids=str,
)
def test_reads_do_not_grow_with_micro_batches(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One: whether the step is finite. (In the padded layout transformers' mask reads two values a forward.)"""
    one, four = (reads(tmp_path, monkeypatch, accumulation, **options) for accumulation in (1, 4))
    assert one == four == Counter({"_local_scalar_dense": 1})


def test_the_optimizer_is_fused(tmp_path: Path) -> None:
    """AdamW in one kernel for all weights, on the CPU too, where the user does not ask for another."""
    run = trainer(tmp_path, max_steps=1, use_cpu=True)
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)
    assert run.optimizer.optimizer.defaults["fused"] is True
