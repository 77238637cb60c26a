"""Going on with a checkpoint: what TRL takes without a word, and what becomes of TRL's own checkpoints here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from parity_harness import REFERENCE, Library, build
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import standard_rows, tiny_model

pytestmark = pytest.mark.trl

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
RANK = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def reference() -> dict[str, Any]:
    """TRL finds none by itself for a model that was made in memory."""
    return {"ref_model": tiny_model(**REFERENCE)}


def begun(library: Library, **arguments: Any) -> Path:
    """A checkpoint after the first of three steps."""
    run = build(library, "dpo", SAVED, **(arguments or reference()))
    run.train()
    return Path(run.args.output_dir, "checkpoint-1")


def other_rows() -> Dataset:
    """The first row changed, the last two in another order."""
    rows = standard_rows()
    rows["chosen"][0] = rows["chosen"][1]
    count = len(rows["chosen"])
    return Dataset.from_dict(rows).select([*range(count - 2), count - 1, count - 2])


def changed(library: Library) -> Any:
    """Another loss, beta, seed, learning rate, reference, and other rows."""
    options = {**SAVED, "loss_type": ["ipo"], "beta": 0.7, "seed": 8, "learning_rate": 1e-2}
    return build(library, "dpo", options, train_dataset=other_rows(), ref_model=tiny_model(seed=5))


def test_a_resumed_run_with_other_numbers_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    theirs = changed("trl")
    with caplog.at_level(logging.WARNING):
        theirs.train(resume_from_checkpoint=str(begun("trl")))
    assert theirs.state.global_step == 3
    assert "beta" not in caplog.text
    ours = changed("prefopt")
    with pytest.raises(ValueError, match="of a run with other numbers") as refused:
        ours.train(resume_from_checkpoint=str(begun("prefopt")))
    named = [line.split()[0] for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert named == ["was", "beta", "learning_rate", "loss_type", "seed", "reference:", "data:"]


def test_intervals_of_a_resumed_run_act() -> None:
    """Steps whose log row is new: TRL keeps the interval of the checkpoint."""
    logged = {}
    for library in ("trl", "prefopt"):
        checkpoint = begun(library)
        resumed = build(library, "dpo", {**SAVED, "logging_steps": 3}, **reference())
        resumed.train(resume_from_checkpoint=str(checkpoint))
        logged[library] = [row["step"] for row in resumed.state.log_history if "loss" in row]
    assert logged == {"trl": [1, 2, 3], "prefopt": [1, 3]}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("by_model_init", [False, True], ids=["model", "model_init"])
def test_a_checkpoint_of_trl_starts_a_new_run(
    adapter: bool, by_model_init: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"peft_config": LoraConfig(**RANK)} if adapter else reference()
    checkpoint = begun("trl", **given)
    assert {"training_args.bin", "optimizer.pt", "scheduler.pt"} <= {path.name for path in checkpoint.iterdir()}
    monkeypatch.setattr(torch, "load", None)  # no pickle is read
    if by_model_init:
        given |= {"model": None, "model_init": lambda: tiny_model(seed=9, tie_word_embeddings=True)}
    run = build("prefopt", "dpo", {**SAVED, "learning_rate": 0.0}, **given)
    with caplog.at_level(logging.WARNING, "prefopt"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert "a new run begins from its weights, at step 0" in caplog.text
    assert [row["step"] for row in run.state.log_history if "loss" in row] == [1, 2, 3]
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    saved, own = load_file(checkpoint / name), load_file(Path(run.args.output_dir, "checkpoint-3", name))
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())


def test_a_checkpoint_of_trl_on_other_modules_is_refused() -> None:
    """None of its weights would be read."""
    checkpoint = begun("trl", peft_config=LoraConfig(**RANK))
    other = LoraConfig(**{**RANK, "target_modules": ["o_proj"]})
    build("trl", "dpo", SAVED, peft_config=other).train(resume_from_checkpoint=str(checkpoint))
    run = build("prefopt", "dpo", SAVED, peft_config=other)
    with pytest.raises(ValueError, match=r"Missing: \S+o_proj\.lora_A.* Not known to the model: \S+q_proj\.lora_A"):
        run.train(resume_from_checkpoint=str(checkpoint))
