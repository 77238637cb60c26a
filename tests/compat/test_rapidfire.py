"""What frameworks that drive trainers rely on, RapidFire AI above all: as its documents and its code use trainers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import standard_rows, tiny_model, word_tokenizer
from torch import Tensor

from prefopt import CPOConfig, DPOConfig, DPOTrainer, TPOConfig

CONFIGS = (DPOConfig, CPOConfig, TPOConfig)
ROWS, CHUNKS, BATCH = 24, 3, 4
TOTAL_STEPS = ROWS // BATCH
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": BATCH,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
ADAPTERS = ("default", "reference")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


# -- configs by introspection ------------------------------------------------------------------------------------------


class Choice:
    """Values of an option to be searched over."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def searchable(config: type[Any]) -> type[Any]:
    """A subclass made from the signature, whose options may be choices."""
    parameters = [name for name in inspect.signature(config.__init__).parameters if name != "self"]

    def __init__(self: Any, **options: Any) -> None:
        self.given, self.ready = copy.deepcopy(options), False
        config.__init__(self, **{name: value for name, value in options.items() if not isinstance(value, Choice)})
        self.ready = True

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if self.__dict__.get("ready") and name in parameters and name in self.given:
            self.given[name] = value
        config.__setattr__(self, name, value)

    hints = {name: hint | Choice for name, hint in get_type_hints(config).items() if name in parameters}
    members = {"__init__": __init__, "__setattr__": __setattr__, "__annotations__": hints}
    return type(f"Searchable{config.__name__}", (config,), members)


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_read_by_introspection(config: type[Any]) -> None:
    parameters = inspect.signature(config.__init__).parameters
    hints = get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert {"beta", "loss_type", "learning_rate", "max_steps", "max_length"} <= set(parameters)
    for name in set(parameters) - {"self"}:
        assert name in hints
        assert name in fields
    own = {name for name in fields if name not in {f.name for f in dataclasses.fields(config.__mro__[2])}}
    assert own
    assert all(fields[name].metadata.get("help") for name in own)


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_can_be_subclassed_with_other_types(config: type[Any]) -> None:
    made = searchable(config)(output_dir="out", beta=Choice(0.1, 0.5), learning_rate=1e-5, report_to="none")
    assert made.given["beta"].values == (0.1, 0.5)
    assert made.learning_rate == 1e-5
    made.learning_rate = 2e-5
    assert made.given["learning_rate"] == made.learning_rate == 2e-5
    assert isinstance(made, config)
    leaf = config(**{**made.given, "beta": 0.5})
    assert leaf.beta == 0.5


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_copied_and_pickled(config: type[Any]) -> None:
    made = config("out", beta=0.3, report_to="none")
    made.max_steps = 7
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (other.beta, other.max_steps) == (0.3, 7)
        assert other.was_set("beta")
        assert other.was_set("max_steps")
        assert not other.was_set("learning_rate")


def test_a_config_reaches_a_process_that_was_spawned() -> None:
    """A pool's process imports what pickle names and nothing of this file."""
    config = DPOConfig("out", beta=0.3, report_to="none")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(DPOConfig.was_set, (config, "beta"))


# -- training in chunks ------------------------------------------------------------------------------------------------


class ChunkTrainer(DPOTrainer):
    """A trainer of one chunk: the schedule is that of the whole run, its states come from the chunk before."""

    def __init__(self, saved: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.saved = saved
        self.steps_taken = 0

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        optimizer: Any = self.create_optimizer()
        self.create_scheduler(num_training_steps=TOTAL_STEPS, optimizer=optimizer)
        original = optimizer.step

        def step(closure: Any = None) -> Any:
            self.steps_taken += 1
            return original(closure)

        optimizer.step = step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.saved is not None:
            self.optimizer.load_state_dict(self.saved["optimizer"])
            self.lr_scheduler.load_state_dict(self.saved["scheduler"])


def rows() -> Dataset:
    return Dataset.from_dict(standard_rows(ROWS, seed=4))


def policy(adapters: dict[str, dict[str, Tensor]] | None) -> Any:
    """A model with the adapter that is trained and the one that is the reference."""
    torch.manual_seed(7)
    model = get_peft_model(tiny_model(seed=1), LORA)
    model.add_adapter("reference", LORA)
    adapters = adapters or dict.fromkeys(ADAPTERS, get_peft_model_state_dict(model, adapter_name="default"))
    for name, weights in adapters.items():
        set_peft_model_state_dict(model, weights, adapter_name=name)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and "reference" not in name)
    return model


def saved_state(run: Any) -> dict[str, Any]:
    """What is carried to the next chunk, as it would be in shared memory."""
    return pickle.loads(
        pickle.dumps(
            {
                "adapters": {name: get_peft_model_state_dict(run.model, adapter_name=name) for name in ADAPTERS},
                "optimizer": run.optimizer.state_dict(),
                "scheduler": run.lr_scheduler.state_dict(),
                "args": run.args.__dict__,
                "state": json.dumps(run.state.__dict__),
            }
        )
    )


def chunk_run(folder: Path, part: Dataset, saved: dict[str, Any] | None, **options: Any) -> Any:
    names = {"model_adapter_name": "default", "ref_adapter_name": "reference"}
    run = ChunkTrainer(
        saved=saved,
        model=policy(saved and saved["adapters"]),
        args=DPOConfig(str(folder), **OPTIONS, **names, **options),
        train_dataset=part,
        processing_class=word_tokenizer(),
    )
    run.train()
    return run


def test_chunks_are_the_run_that_was_not_cut(tmp_path: Path) -> None:
    whole = chunk_run(tmp_path, rows(), None, max_steps=TOTAL_STEPS)
    size = ROWS // CHUNKS
    saved, losses = None, []
    for chunk in range(CHUNKS):
        last = {"max_steps": size // BATCH} if chunk == CHUNKS - 1 else {"num_train_epochs": 1}
        run = chunk_run(tmp_path, rows().select(range(chunk * size, (chunk + 1) * size)), saved, **last)
        assert run.steps_taken == run.state.global_step == size // BATCH
        losses += [row["loss"] for row in run.state.log_history if "loss" in row]
        run.model.to("cpu")
        saved = saved_state(run)
    assert losses == [row["loss"] for row in whole.state.log_history if "loss" in row]
    expected = saved_state(whole)
    for name in ADAPTERS:
        ours, right = saved["adapters"][name], expected["adapters"][name]
        assert ours.keys() == right.keys()
        assert all(torch.equal(ours[key], right[key]) for key in right), name
    assert saved["scheduler"] == expected["scheduler"]
    moved = saved["adapters"]
    assert any(not torch.equal(moved["default"][key], moved["reference"][key]) for key in moved["default"])


def full_run(folder: Path, model: Any, **options: Any) -> Any:
    return DPOTrainer(
        model,
        args=DPOConfig(str(folder), **{**OPTIONS, "lr_scheduler_type": "constant", **options}),
        train_dataset=rows(),
        processing_class=word_tokenizer(),
    )


def flat(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_new_trainer_may_resume_with_more_steps_each_time(tmp_path: Path) -> None:
    """As tools do that know nothing but ``max_steps`` and checkpoints; with the order of rows that is the default."""
    random_order = {"train_sampling_strategy": "random"}
    whole = full_run(tmp_path / "whole", tiny_model(seed=1), max_steps=6, **random_order)
    whole.train()
    checkpoint = None
    for steps in (2, 4, 6):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, **random_order}
        run = full_run(tmp_path / "cut", tiny_model(seed=1), **options)
        run.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(tmp_path / "cut" / f"checkpoint-{steps}")
    assert torch.equal(flat(run.model), flat(whole.model))


@pytest.mark.parametrize("way", ["pickled", "copied"])
def test_a_trained_model_may_travel(way: str, tmp_path: Path) -> None:
    """Through shared memory, say: another trainer trains it as it would have trained the one that stayed."""
    first = full_run(tmp_path, tiny_model(seed=1), max_steps=1)
    first.train()
    model = first.model
    other = copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model))
    stayed, travelled = (full_run(tmp_path, each, max_steps=2) for each in (model, other))
    assert stayed.layout == travelled.layout
    stayed.train()
    travelled.train()
    assert torch.equal(flat(travelled.model), flat(stayed.model))
    assert first.state.global_step == 1


def test_trainers_live_side_by_side(tmp_path: Path) -> None:
    """Two in one process, trained in turn, are each what they would be alone."""
    alone = {}
    for beta in (0.1, 0.9):
        run = full_run(tmp_path, tiny_model(seed=1), max_steps=3, beta=beta)
        run.train()
        alone[beta] = flat(run.model)
    together = {beta: full_run(tmp_path, tiny_model(seed=1), max_steps=3, beta=beta) for beta in alone}
    for run in together.values():
        run.train()
    for beta, run in together.items():
        assert torch.equal(flat(run.model), alone[beta])
    assert not torch.equal(alone[0.1], alone[0.9])
