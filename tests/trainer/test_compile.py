"""``torch_compile``: decoder layers compiled once for all lengths of batches, with the numbers of the plain run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import dataset, relative_difference, trainer, weights
from tiny_models import tiny_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from prefopt.trainer.compile import compile_layers, decoder_layers

COMPILED = 1e-5
"""Relative norm of the weights after five steps of Adam in float32: a compiled layer sums in another order."""
ADAPTER = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Counters and compiled code of this test alone."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class CountGraphs(TrainerCallback):
    """How many graphs there are after each step, and after each evaluation."""

    def __init__(self) -> None:
        self.after_steps: list[int] = []
        self.after_evaluations: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_steps.append(graphs())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_evaluations.append(graphs())


def run(folder: Path, *, lora: bool = False, **options: Any) -> Any:
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(**ADAPTER)
    made = trainer(folder, **{"max_steps": 5, "use_cpu": True, **options})
    made.train()
    return made


CHECKPOINTING = {"method": "cpo", "loss_type": "simpo", "gradient_checkpointing": True}
"""Without a reference, whose layers recompute nothing: the graphs are the training's."""
REENTRANT = {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CASES: dict[str, dict[str, Any]] = {
    "shared_prompt-eager": {},
    "shared_prompt-aot_eager": {},
    "padded-eager": {"layout": "padded"},
    "lora-aot_eager": {"lora": True},
    "checkpointing-aot_eager": CHECKPOINTING,
    "reentrant-aot_eager": REENTRANT,
    "reentrant_lora-eager": {"lora": True, **REENTRANT},
    "accumulating-eager": {"method": "cpo", "loss_type": "simpo", "gradient_accumulation_steps": 2, "count": 60},
}
"""What runs, and the backend."""


@pytest.mark.parametrize("case", CASES)
def test_new_lengths_need_no_new_graph(case: str, tmp_path: Path) -> None:
    options, backend = CASES[case], case.split("-")[1]
    plain = run(tmp_path / "plain", **options)
    assert graphs() == 0
    count = CountGraphs()
    compiled = run(tmp_path / "compiled", torch_compile_backend=backend, callbacks=[count], **options)
    assert count.after_steps[1] > 0
    assert count.after_steps[1] == count.after_steps[-1]
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    assert relative_difference(weights(compiled.model), weights(plain.model)) < COMPILED
    assert compiled.args.torch_compile is True
    assert compiled.accelerator.state.dynamo_plugin.backend.value == "NO"


def test_layers_of_a_kind_share_their_graphs(tmp_path: Path) -> None:
    numbers = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        run(tmp_path, model=tiny_model(num_hidden_layers=layers), torch_compile_backend="eager", max_steps=2)
        numbers.append(graphs())
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families(family: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", model=tiny_model(family, seed=1))
    count = CountGraphs()
    model = tiny_model(family, seed=1)
    compiled = run(tmp_path / "compiled", model=model, torch_compile_backend="eager", callbacks=[count])
    assert 0 < count.after_steps[1] == count.after_steps[-1]
    assert relative_difference(weights(compiled.model), weights(plain.model)) < COMPILED


@pytest.mark.parametrize("reference", [{}, {"lora": True}, {"precompute_ref_log_probs": True}])
def test_evaluation_and_reference(reference: dict[str, Any], tmp_path: Path) -> None:
    """Every second step evaluates, on rows of ever new lengths; a reference model of its own is compiled too."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset(24, seed=4), "max_steps": 6}
    plain = run(tmp_path / "plain", **options, **reference)
    count = CountGraphs()
    compiled = run(tmp_path / "compiled", torch_compile_backend="eager", callbacks=[count], **options, **reference)
    assert 0 < count.after_evaluations[0] == count.after_evaluations[-1]
    if compiled.ref_model is not None:
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(compiled.ref_model))
    for ours, theirs in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        if "eval_loss" in ours:
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=COMPILED)


def test_evaluation_alone_is_compiled(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=dataset(8), torch_compile_backend="eager", use_cpu=True)
    plain = trainer(tmp_path, eval_dataset=dataset(8), use_cpu=True).evaluate()
    assert made.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=COMPILED)
    assert graphs() > 0


def test_saved_weights_and_copies_are_plain(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    compiled = run(tmp_path / "compiled", torch_compile_backend="eager")
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    compiled.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == plain.model.state_dict().keys()
    twin = copy.deepcopy(compiled.model)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(twin))
    ids = torch.tensor([[1, 20, 30]])
    before = graphs()
    assert torch.allclose(twin.eval()(ids).logits, plain.model.eval()(ids).logits, atol=1e-4)
    assert graphs() == before


# -- which layers ------------------------------------------------------------------------------------------------------


def test_layers_are_found_by_name_or_as_the_heaviest_list() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["Qwen3MoeDecoderLayer"] * 3
    model._no_split_modules = None
    model.model.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["Qwen3MoeDecoderLayer"] * 3


def test_a_model_without_layers_is_compiled_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model._no_split_modules = None
    model.model.layers = Stack(list(model.model.layers))
    for _ in range(2):
        compile_layers(model, {"backend": "eager", "dynamic": True})
    assert model.model._compiled_call_impl is not None
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "LlamaForCausalLM" in record.message


class Stack(nn.Module):
    """Layers under names of their own, as old remote code may have them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(f"layer_{number}", layer)
