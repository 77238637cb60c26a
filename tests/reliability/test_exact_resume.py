"""A run that is interrupted after any step and resumed is the run that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scale import LONG
from short_runs import dataset, log_rows, trainer
from tiny_models import tiny_model
from transformers import TrainerCallback

from prefopt.checkpoints.tensors import read_state

STEPS = 20
ROWS = 26
"""Seven steps an epoch, the last of them smaller: the steps 7 and 14 are an epoch's end, and 20 lies within one."""
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
METHODS = {
    "dpo": ("dpo", {}),
    "cpo": ("cpo", {}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo": ("tpo", {}),
}
LAYOUTS = ("shared_prompt", "packed", "padded")
ALL = list(product(METHODS, ("full", "lora"), ("map", "stream"), (0, 2), LAYOUTS))
PAIRWISE = [
    ("dpo", "full", "map", 0, "shared_prompt"),
    ("dpo", "lora", "stream", 2, "packed"),
    ("dpo", "full", "stream", 0, "padded"),
    ("cpo", "lora", "map", 0, "shared_prompt"),
    ("cpo", "full", "stream", 2, "packed"),
    ("cpo", "lora", "map", 2, "padded"),
    ("simpo", "full", "stream", 2, "shared_prompt"),
    ("simpo", "lora", "map", 0, "packed"),
    ("simpo", "lora", "stream", 0, "padded"),
    ("tpo", "lora", "stream", 0, "shared_prompt"),
    ("tpo", "full", "map", 2, "packed"),
    ("tpo", "full", "map", 0, "padded"),
]
"""Every two values of two of the five occur together."""
SAMPLE = ((1, 13), (7, 20), (14, 19), (6, 8))
"""Steps that the sample resumes after, in turn: the first, within an epoch, before, at and after its end, the last."""
CASES = (
    [(case, range(1, STEPS + 1)) for case in ALL]
    if LONG
    else [(case, SAMPLE[index % len(SAMPLE)]) for index, case in enumerate(PAIRWISE)]
)


class SaveAfter(TrainerCallback):
    """Saves after these steps, and after the last."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = {*steps, STEPS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def made(folder: Path, case: tuple[Any, ...], saves: Sequence[int] = (), **options: Any) -> Any:
    method, tuned, kind, workers, layout = case
    name, of_method = METHODS[method]
    if tuned == "lora":
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
    rows = dataset(ROWS)
    options = {
        "max_steps": STEPS,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "eval_dataset": dataset(6, seed=1),
        "save_strategy": "steps",
        "save_steps": 10 * STEPS,
        "dataloader_num_workers": workers,
        "layout": layout,
        "disable_dropout": False,
        "callbacks": [SaveAfter(saves)],
        "model": tiny_model("phi", seed=1, **DROPOUT),
        **of_method,
        **options,
    }
    torch.manual_seed(5)  # of a new adapter
    return trainer(folder, name, rows=rows.to_iterable_dataset() if kind == "stream" else rows, **options)


def assert_same_checkpoint(ours: Path, theirs: Path, adapter: bool) -> None:
    """Weights, optimizer, learning rate and random numbers are equal, bit for bit."""
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert_equal(load_file(ours / name), load_file(theirs / name), name)
    for state in ("optimizer", "scheduler", "rng_0"):
        assert_equal(read_state(ours, state), read_state(theirs, state), state)


def assert_equal(ours: Any, theirs: Any, place: str) -> None:
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key, value in ours.items():
            assert_equal(value, theirs[key], f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{place}.{index}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert (ours == theirs) is True or bool((ours == theirs).all()), place  # numpy's state is an array


def assert_resumes(folder: Path, run: Any, points: Sequence[int], adapter: bool) -> None:
    """``run(folder, points)`` makes the trainer."""
    whole = run(folder / "whole", points)
    whole.train()
    for point in points:
        resumed = run(folder / "resumed", ())
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{point}"))
        assert log_rows(resumed) == log_rows(whole), point
        last = f"checkpoint-{whole.state.global_step}"
        if (folder / "resumed" / last).is_dir():  # after the last step there is none to save
            assert_same_checkpoint(folder / "resumed" / last, folder / "whole" / last, adapter)
        assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()), f"after {point}")


@pytest.mark.parametrize(("case", "points"), CASES, ids=lambda value: "-".join(map(str, value[:5])))
def test_a_run_goes_on_exactly_after_any_step(
    case: tuple[Any, ...], points: Sequence[int], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    assert_resumes(tmp_path, lambda folder, saves: made(folder, case, saves), points, case[1] == "lora")
    figure(f"exact resume: {' '.join(map(str, case))}", f"equal after each of {len(points)} of {STEPS} steps")


def test_every_two_values_occur_together() -> None:
    """What the sample promises."""
    found = {(i, case[i], j, case[j]) for case in PAIRWISE for i in range(5) for j in range(i)}
    assert found == {(i, case[i], j, case[j]) for case in ALL for i in range(5) for j in range(i)}
