"""Memory that runs out at any point of a step, an evaluation or the reference's pass changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from scale import scaled
from short_runs import dataset, log_rows, relative_difference, trainer, weights
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.trainer.guards.out_of_memory import MicroBatchMemoryError, is_out_of_memory

TOLERANCE = 1e-6
"""Sums of float32 taken in another order; the project's own bound for splits."""
RELEASED = 0.01
"""Share of the bytes of a failed attempt that may be left: a few numbers of each pair."""
ERRORS: dict[str, tuple[type[Exception], str]] = {
    "CUDA": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.1 GiB"),
    "CPU": (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "cuBLAS": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Python": (MemoryError, ""),
}


class Memory(TorchDispatchMode):
    """Runs out, once armed, with the operator of a number; knows the storages that were made until then."""

    def __init__(self, error: str, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.error, self.left = ERRORS[error], -1
        self.made: list[tuple[StorageWeakRef, int]] = []
        self.alive_again = 1.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            self.left = -1
            kind, text = self.error  # made here: an exception keeps the frames that it has passed
            raise kind(text)
        result = func(*args, **(kwargs or {}))
        if self.left > 0:
            self.left -= 1
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                    storage = leaf.untyped_storage()
                    self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self) -> float:
        """The share of the bytes that were made."""
        return sum(size for ref, size in self.made if not ref.expired()) / sum(size for _, size in self.made)


@contextmanager
def running_out(run: Any, at_step: int, after: int, error: str) -> Iterator[Memory]:
    """In ``at_step`` (from 1) memory runs out ``after`` operators, once."""
    weights_of = [parameter for model in run.models() for parameter in model.parameters()]
    memory, original, failed = Memory(error, weights_of), run.attempt_step, []

    def attempt(model: Any, step: Any) -> Any:
        if run.state.global_step + 1 == at_step and not failed:
            failed.append(step)
            memory.left = after
            with memory:
                return original(model, step)
        if failed and len(memory.made) and memory.alive_again == 1.0:
            memory.alive_again = memory.alive()
        return original(model, step)

    run.attempt_step = attempt
    yield memory
    assert failed, "the step was not reached: the test is vacuous"
    assert memory.left == -1, "memory did not run out: the test is vacuous"


def operators(run: Any) -> int:
    """How many a step of the run takes."""
    counted = Memory("Python")
    counted.left = 10**9
    original = run.attempt_step

    def attempt(model: Any, step: Any) -> Any:
        with counted:
            return original(model, step)

    run.attempt_step = attempt
    run.train()
    return 10**9 - counted.left


CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "accumulating": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "a budget": {"tokens_per_batch": 120},
    "padded": {"layout": "padded", "method": "tpo"},
    "packed": {"layout": "packed", "method": "cpo", "loss_type": "simpo"},
    "a loss of the whole step": {"loss_type": ["aot", "sft"]},
    "a running shift": {"loss_type": "bco_pair", "bco_shift": True},
    "an adapter": {"lora": True},
    "a stream": {"stream": True, "dataloader_num_workers": 1},
    "recomputing": {"gradient_checkpointing": True},
}
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "lr_scheduler_type": "constant", "use_cpu": True}
"""Adam's first steps have the size of the learning rate whatever the gradient, and show its rounding enlarged."""


def made(folder: Path, *, lora: bool = False, stream: bool = False, method: str = "dpo", **options: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]) if lora else None
    rows: Any = dataset(21)
    if stream:
        rows = IterableDataset.from_generator(lambda: iter(dataset(21)))
    return trainer(folder, method, rows=rows, peft_config=config, **{**SGD, **options})


def same(ours: Any, theirs: Any) -> None:
    """Weights and rows of the log are equal, but for rounding."""
    assert relative_difference(weights(ours.model), weights(theirs.model)) < TOLERANCE
    for mine, other in zip(log_rows(ours), log_rows(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_done_again_with_the_same_result(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At places spread over forward and backward passes of policy and reference."""
    options = CASES[name]
    whole = made(tmp_path / "whole", **options)
    whole.train()
    counted = operators(made(tmp_path / "counted", max_steps=1, **options))
    number = scaled(2, 20)
    for place in range(number):
        caplog.clear()
        run = made(tmp_path / str(place), **options)
        error = list(ERRORS)[place % len(ERRORS)]
        with running_out(run, 1 + place % 3, int(counted * (0.3 + 0.6 * place / number)), error) as memory:
            run.train()
        same(run, whole)
        assert run.train_cut.parts == 2
        said = [record for record in caplog.records if "Memory ran out" in record.message]
        assert len(said) == 1
        assert f"step {1 + place % 3} " in said[0].message
        assert memory.alive_again < RELEASED


def test_it_goes_down_to_one_pair_and_then_says_what_to_do(tmp_path: Path) -> None:
    run = made(tmp_path)
    sizes = []

    def attempt(model: Any, step: Any) -> Any:
        sizes.append([len(batch.rows) for batch in step.micro_batches])
        raise MemoryError("no memory")

    run.attempt_step = attempt
    with pytest.raises(MicroBatchMemoryError, match=r"step 1, even with one pair.*gradient_checkpointing=True.*LoRA"):
        run.train()
    assert sizes == [[4], [2, 2], [1, 1, 1, 1]]
    assert run.state.global_step == 0


def test_the_smaller_size_is_kept_by_the_run_and_its_checkpoints(tmp_path: Path) -> None:
    run = made(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    with running_out(run, 1, 50, "Python"):
        run.train()
    whole = made(tmp_path / "whole", max_steps=4)
    whole.train()
    again = made(tmp_path, max_steps=4)
    sizes = counted_sizes(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sizes == [[2, 2], [2, 2]]
    same(again, whole)


def test_a_new_run_begins_with_micro_batches_of_the_whole_size(tmp_path: Path) -> None:
    run = made(tmp_path, max_steps=1)
    with running_out(run, 1, 50, "Python"):
        run.train()
    run.eval_cut.parts = 4
    sizes = counted_sizes(run)
    run.train()
    assert sizes == [[4]]
    assert run.eval_cut.parts == 1


@pytest.mark.parametrize(("size", "smaller"), [(5, (1, 10)), (9, (3, 6)), (8, (4, 4))], ids=str)
def test_the_advice_keeps_the_pairs_of_a_step(size: int, smaller: tuple[int, int], tmp_path: Path) -> None:
    run = made(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=2)
    run.accumulation = 2
    batch, accumulation = smaller
    assert run.smaller_batches() == (
        f"Set per_device_train_batch_size={batch}, gradient_accumulation_steps={accumulation}."
    )


def counted_sizes(run: Any) -> list[list[int]]:
    """Pairs of the micro-batches of each step, as they come to be computed."""
    sizes, original = [], run.attempt_step

    def attempt(model: Any, step: Any) -> Any:
        sizes.append([len(batch.rows) for batch in step.micro_batches])
        return original(model, step)

    run.attempt_step = attempt
    return sizes


def failing_once(call: Callable[..., Any], kind: type[Exception], text: str) -> Callable[..., Any]:
    calls: list[Any] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise kind(text)
        return call(*args, **kwargs)

    return wrapped


def test_an_evaluation_and_its_predictions_are_the_same(tmp_path: Path) -> None:
    def evaluated(folder: str, fails: bool) -> Any:
        run = made(tmp_path / folder, loss_type=["sigmoid", "aot"], eval_dataset=dataset(9, seed=1))
        if fails:
            run.model.forward = failing_once(run.model.forward, *ERRORS["CPU"])
        return run.predict(dataset(9, seed=1)), run.eval_cut.parts

    (whole, _), (halved, parts) = evaluated("whole", False), evaluated("halved", True)
    assert parts == 2
    for name, value in whole.metrics.items():
        if "per_second" not in name and "time" not in name:
            assert halved.metrics[name] == pytest.approx(value, rel=1e-5), name
    for ours, theirs in zip(halved.predictions[:4], whole.predictions[:4], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def test_the_references_pass_is_the_same(tmp_path: Path, reference_cache: Path) -> None:
    whole = made(tmp_path / "whole", precompute_ref_log_probs=True)
    whole.train()
    for file in reference_cache.rglob("*"):
        file.unlink() if file.is_file() else None
    run = made(tmp_path / "halved", precompute_ref_log_probs=True)
    own = run.model_reference
    own.model.forward = failing_once(own.model.forward, *ERRORS["CUDA"])
    run.train()
    assert run.eval_cut.parts == 2
    same(run, whole)


@pytest.mark.parametrize("name", ERRORS)
def test_what_says_that_memory_ran_out(name: str) -> None:
    kind, text = ERRORS[name]
    assert is_out_of_memory(kind(text))


@pytest.mark.parametrize("error", [(RuntimeError, "shapes do not match"), (ValueError, "out of memory")], ids=str)
def test_other_errors_stay_errors(error: tuple[type[Exception], str], tmp_path: Path) -> None:
    run = made(tmp_path)
    sizes = counted_sizes(run)
    run.model.forward = failing_once(run.model.forward, *error)
    with pytest.raises(error[0]):
        run.train()
    assert len(sizes) == 1
