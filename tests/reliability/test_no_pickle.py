"""No run writes a pickle or reads one, and one that is planted never runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import dataset, log_rows, trainer, weights
from tiny_models import tiny_model

from prefopt.checkpoints.tensors import read_state
from prefopt.trainer.saving.adapter_files import load_adapter_weights
from prefopt.trainer.saving.weight_files import load_weights

STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt")
MODELS = ("pytorch_model.bin", "adapter_model.bin", "pytorch_model_fsdp.bin", "training_args.bin")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def plant(folder: Path, mark: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))


def adapter() -> Any:
    from peft import LoraConfig

    torch.manual_seed(3)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def made(folder: Path, *, lora: bool, **options: Any) -> Any:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": dataset(6, seed=1),
        "load_best_model_at_end": True,
        **options,
    }
    return trainer(folder, peft_config=adapter() if lora else None, **options)


@pytest.fixture
def without_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was used")

    for module in (pickle, torch):
        for name in ("dump", "dumps", "load", "loads", "save", "Unpickler"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refused)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_needs_none(lora: bool, tmp_path: Path, without_pickle: None) -> None:
    """It trains, saves, loads its best model, and is resumed exactly."""
    whole = made(tmp_path / "whole", lora=lora)
    whole.train()
    resumed = made(tmp_path / "resumed", lora=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_rows(resumed) == log_rows(whole)
    found = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert found <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".lock"}, found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_planted_beside_is_not_read(lora: bool, tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    """Neither on resume, nor when the best model is loaded, which is one of before the resume here."""
    mark = tmp_path / "it ran"
    whole = made(tmp_path / "run", lora=lora, metric_for_best_model="num_tokens", greater_is_better=False)
    whole.train()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        plant(checkpoint, mark, *STATES, *MODELS)
    resumed = made(tmp_path / "run", lora=lora, metric_for_best_model="num_tokens", greater_is_better=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint == whole.state.best_model_checkpoint
    assert Path(str(resumed.state.best_model_checkpoint)).name == "checkpoint-1"
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert not mark.exists()
    figure(f"planted pickle: {'adapter' if lora else 'model'}", f"none of {len(STATES + MODELS)} in a checkpoint ran")


def test_weights_that_are_pickled_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    plant(tmp_path, mark, "pytorch_model.bin", "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never read.*safetensors"):
        load_weights(tiny_model(), tmp_path)
    assert not mark.exists()


def test_adapters_that_are_pickled_are_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    mark = tmp_path / "it ran"
    model = get_peft_model(tiny_model(), adapter())
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    plant(tmp_path, mark, "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*never read"):
        load_adapter_weights(model, tmp_path)
    assert not mark.exists()


def test_a_search_keeps_its_trials_without(tmp_path: Path, without_pickle: None) -> None:
    """Ray's checkpoints have a method of their own in transformers."""
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run._tune_save_checkpoint(str(tmp_path))
    state = read_state(tmp_path / "checkpoint-1", "optimizer")
    assert state["state"][0]["step"] == 1


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_the_hub_gets_none(strategy: str, tmp_path: Path, without_pickle: None, monkeypatch: Any) -> None:
    """What would be uploaded, and from where: a checkpoint that is deleted meanwhile does not matter to the model."""
    from prefopt.trainer.saving import pushing

    sent: list[tuple[str, str | None, set[str]]] = []

    class Job:
        def done(self) -> bool:
            return True

    class Hub:
        def upload_folder(self, *, folder_path: str, path_in_repo: str | None = None, **options: Any) -> Job:
            sent.append((folder_path, path_in_repo, {path.name for path in Path(folder_path).iterdir()}))
            return Job()

    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "checkpoint-1"))
    run.args.hub_strategy = pushing.HubStrategy(strategy)
    run.push_in_progress, run.hub_model_id = None, "someone/model"
    monkeypatch.setattr(pushing, "HfApi", Hub)
    run._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    expected = {
        "every_save": [(str(tmp_path), None)],
        "checkpoint": [(str(tmp_path), None), (str(tmp_path / "checkpoint-1"), "last-checkpoint")],
        "all_checkpoints": [(str(tmp_path), None), (str(tmp_path / "checkpoint-1"), "checkpoint-1")],
        "end": [],
    }
    assert [place[:2] for place in sent] == expected[strategy]
    for _, _, names in sent:
        assert {"model.safetensors", "config.json", "tokenizer.json", "training_args.json", "README.md"} <= names


@pytest.mark.parametrize("family", ["qwen3_moe", "phi", "lfm2"])
def test_weights_that_are_saved_in_pieces_come_back(family: str, tmp_path: Path) -> None:
    """Transformers takes experts apart when it saves."""
    saved, fresh = tiny_model(family, seed=1), tiny_model(family, seed=2)
    saved.save_pretrained(tmp_path)
    load_weights(fresh, tmp_path)
    assert torch.equal(weights(fresh), weights(saved))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not those of this model.*layers\.2"):
        load_weights(tiny_model(num_hidden_layers=3), tmp_path)


def test_tied_and_sharded_weights_come_back(tmp_path: Path) -> None:
    saved, fresh = (tiny_model(seed=seed, tie_word_embeddings=True) for seed in (1, 2))
    saved.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_weights(fresh, tmp_path)
    assert torch.equal(weights(fresh), weights(saved))
