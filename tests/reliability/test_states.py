"""States without pickle: exact on return, and whatever pickle is planted never runs."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from short_runs import trainer, weights
from torch import nn
from torch.optim import lr_scheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from prefopt.checkpoints.rng import rng_state, seed_rng, set_rng_state
from prefopt.checkpoints.tensors import read_state, write_state
from prefopt.trainer.saving.states import load_exactly, without_code

MAPS = Path("/proc/self/maps")
TABLE = torch.arange(20.0).reshape(4, 5)
TYPES = [f"float{size}" for size in (64, 32, 16, "8_e4m3fn", "8_e5m2")] + [
    "bfloat16",
    "bool",
    "complex64",
    "complex128",
]
TYPES += [f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64)]
VALUES: dict[str, Any] = {
    "plain": [None, True, False, 0, -1, 2**80, "text", "", "$tensor"],
    "floats": [0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, 1e300, complex(1, math.nan)],
    "sequences": [(1, (2.0,)), [], (), {1, 2}, frozenset({"a"}), torch.Size([2, 3])],
    "keys": {"1": "a", 1: "b", 1.5: "c", None: "d", (1, 2): "e", "$dict": "f"},
    "marked": {"$b": 1},
    "empty": {},
    "mappings": [OrderedDict(b=1, a=2), Counter({3: 1})],
    "others": [b"\x00\xff", torch.bfloat16],
    "types": [torch.ones(3).to(getattr(torch, name)) for name in TYPES],
    "shapes": [torch.tensor(1.5), torch.empty(0, 3), torch.empty(2, 0, dtype=torch.uint16), torch.ones(1, 1, 1)],
    "views": [TABLE.T, TABLE[1:3], TABLE[:, ::2], TABLE.expand(2, 4, 5), (TABLE * 1j).conj(), TABLE.flip(0)],
    "nan": [torch.tensor([math.nan, math.inf, -0.0])],
    "weights": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "eight_bit": {0: {"state1": torch.randint(0, 256, (4096,), dtype=torch.uint8), "qmap1": torch.rand(256)}},
    "numpy": [np.arange(6).reshape(2, 3), np.empty((0, 2)), np.array(["ab", "c"]), np.array(2.5), np.array([True])],
    "scalars": [np.float64(0.1), np.float32(3), np.bool_(True), np.int64(-5), np.datetime64("2020-01-01")],
    "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
}
ELSEWHERE = ("galore", "apollo", "lomo", "adalomo", "grokadamw", "stable_adamw", "adamw_torch_xla", "adamw_torch_npu")
"""Optimizers that keep objects, or not all of their state in ``state_dict``, or need a device that is not here."""
AVAILABLE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Optimizers that need nothing else installed."""


def assert_same(ours: Any, theirs: Any, place: str = "") -> None:
    """Equal in value and type, in all parts."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, torch.Tensor | np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), place
        assert raw(ours) == raw(theirs), place
    elif isinstance(ours, dict):
        assert [repr(key) for key in ours] == [repr(key) for key in theirs], place
        for (key, one), other in zip(ours.items(), theirs.values(), strict=True):
            assert_same(one, other, f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{place}.{index}")
    else:
        assert repr(ours) == repr(theirs), place


def raw(value: Any) -> bytes:
    """The bytes of a tensor or an array, so that a NaN is equal to itself."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy()
    return value.tobytes()


def there_and_back(state: Any, folder: Path) -> Any:
    write_state(state, folder, "state")
    return read_state(folder, "state")


class TestValues:
    @pytest.mark.parametrize("name", VALUES)
    def test_comes_back_exactly(self, name: str, tmp_path: Path) -> None:
        assert_same(there_and_back(VALUES[name], tmp_path), VALUES[name])

    def test_a_tensor_that_occurs_twice_is_one_tensor(self, tmp_path: Path) -> None:
        state = {"a": TABLE, "b": [TABLE, TABLE.detach()], "other": TABLE.clone()}
        back = there_and_back(state, tmp_path)
        assert back["a"] is back["b"][0] is back["b"][1] is not back["other"]
        assert len(load_file(tmp_path / "state.safetensors")) == 2

    def test_places_that_read_alike_are_apart(self, tmp_path: Path) -> None:
        state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
        assert_same(there_and_back(state, tmp_path), state)

    @pytest.mark.skipif(not MAPS.exists(), reason="what is mapped is known on Linux alone")
    def test_what_is_read_is_not_the_file(self, tmp_path: Path) -> None:
        """A mapped file that is cut short or lost (NFS) would take the process with it."""
        back = there_and_back([TABLE], tmp_path)
        assert str(tmp_path) not in MAPS.read_text()
        assert torch.equal(back[0], TABLE)

    def test_the_files_hold_no_code_and_are_standard_json(self, tmp_path: Path) -> None:
        there_and_back(VALUES, tmp_path)
        text = (tmp_path / "state.json").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}

    @pytest.mark.parametrize(
        "value",
        [object(), lambda: 0, np.array([object()]), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), type],
        ids=["object", "function", "objects", "sparse", "meta", "class"],
    )
    def test_anything_else_is_refused_by_its_place(self, value: Any, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"optimizer\.state\.0\.projector"):
            write_state({"state": {0: {"projector": value}}}, tmp_path, "optimizer")

    @pytest.mark.parametrize("module", ["os", "torchao_of_another", "subprocess"])
    def test_a_file_names_no_code(self, module: str, tmp_path: Path) -> None:
        """The one place that imports by a name knows whose tensors there are."""
        write_state([], tmp_path, "state")
        asked = {"$wrapped": {}, "module": module, "class": "system", "context": ["true"], "shape": [[], []]}
        (tmp_path / "state.json").write_text(json.dumps(asked))
        with pytest.raises(ValueError, match=f"asks for {module}.system"):
            read_state(tmp_path, "state")


class TestOptimizers:
    """Three updates, to the disk and back, three more: as six in one go."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", [name.value for name in OptimizerNames if not name.value.startswith(ELSEWHERE)])
    def test_goes_on_exactly(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        whole = layers(dtype)
        try:
            optimizer = optimizer_of(name, whole, tmp_path)
        except (ImportError, ValueError) as missing:
            assert name not in AVAILABLE
            pytest.skip(str(missing)[:80])
        updates(whole, optimizer, range(3))
        state = there_and_back(optimizer.state_dict(), tmp_path)
        resumed = layers(dtype)
        resumed.load_state_dict(whole.state_dict())
        other = optimizer_of(name, resumed, tmp_path)
        load_exactly(other, state)
        updates(whole, optimizer, range(3, 6))
        updates(resumed, other, range(3, 6))
        assert torch.equal(weights(resumed), weights(whole))


def layers(dtype: torch.dtype) -> nn.Module:
    """With weights of more than 4096 numbers, below which 8-bit optimizers keep 32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64), nn.LayerNorm(64)).to(dtype)


def optimizer_of(name: str, model: nn.Module, folder: Path) -> Any:
    args = TrainingArguments(str(folder), optim=name, use_cpu=True, report_to="none")
    make, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return make(groups, **options)


def updates(model: nn.Module, optimizer: Any, steps: range) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        torch.manual_seed(100 + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


class Halving:
    def __init__(self) -> None:
        self.factor = 1.0  # a function of the user's with numbers of its own, which are kept

    def __call__(self, step: int) -> float:
        self.factor *= 0.5
        return self.factor


class OwnSchedule(lr_scheduler.LRScheduler):
    """A user's, with a function among its attributes."""

    def __init__(self, optimizer: Any) -> None:
        self.shape, self.seen = (lambda step: 1 / (1 + step)), 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.seen += 1
        return [base * self.shape(self.seen) for base in self.base_lrs]


SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "callable": lambda o: lr_scheduler.LambdaLR(o, Halving()),
    "own": OwnSchedule,
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.LambdaLR(o, lambda step: 0.5**step)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
OPTIONS = {
    "polynomial": {"lr_end": 1e-4},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0},
    "greedy": {"patience": 1},
}


@pytest.mark.parametrize("name", [*SCHEDULES, *(kind.value for kind in SchedulerType)])
def test_a_schedule_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """Also those that look at a metric, which rises here."""

    def made() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        if name in SCHEDULES:
            return optimizer, SCHEDULES[name](optimizer)
        options = {"num_warmup_steps": 2, "num_training_steps": 10, "scheduler_specific_kwargs": OPTIONS.get(name)}
        return optimizer, get_scheduler(name, optimizer, **options)

    def rates(optimizer: Any, scheduler: Any, steps: range) -> list[float]:
        found = []
        for step in steps:
            optimizer.step()
            scheduler.step(*([1.0 + step] if name in ("reduce_lr_on_plateau", "greedy") else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler = made()
    before = rates(optimizer, scheduler, range(4))
    states = there_and_back([optimizer.state_dict(), without_code(scheduler.state_dict())], tmp_path)
    other, resumed = made()
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    after = rates(optimizer, scheduler, range(4, 8))
    assert rates(other, resumed, range(4, 8)) == after
    assert len({*before, *after}) > 1 or name == "constant"


class TestRandomNumbers:
    def test_all_generators_go_on(self, tmp_path: Path) -> None:
        def drawn() -> list[float]:
            return [random.random(), float(np.random.rand()), float(torch.rand(()))]

        device = torch.device("cpu")
        drawn()
        state = there_and_back(rng_state(device, every_device=True), tmp_path)
        expected = drawn()
        set_rng_state(state, device)
        assert drawn() == expected

    def test_seeds_differ_by_rank_and_step_and_are_the_same_again(self) -> None:
        def drawn(*place: int) -> tuple[float, float, float]:
            seed_rng(*place)
            return random.random(), float(np.random.rand()), float(torch.rand(()))

        places = [(seed, rank, step) for seed in (0, 1) for rank in (0, 1, 2) for step in (0, 1, 2)]
        assert len({value for place in places for value in drawn(*place)}) == 3 * len(places)
        assert drawn(3, 1, 2) == drawn(3, 1, 2)

    def test_a_rank_that_was_not_there_is_seeded_by_its_place(self, tmp_path: Path, caplog: Any) -> None:
        """And so is the same in every resume; said in one line."""
        run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        run.train()
        for path in (tmp_path / "checkpoint-2").glob("rng_0.*"):
            path.unlink()
        drawn = []
        for _ in range(2):
            torch.rand(3)
            run._load_rng_state(str(tmp_path / "checkpoint-2"))
            drawn.append(float(torch.rand(())))
        seed_rng(run.args.seed, 0, 2)
        assert drawn == [float(torch.rand(()))] * 2
        lines = [record.getMessage() for record in caplog.records if "seeded" in record.getMessage()]
        assert len(lines) == 2
        assert "without rank 0" in lines[0]
        assert "seed 42, the rank and step 2" in lines[0]
