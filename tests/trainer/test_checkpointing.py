"""Activation checkpointing where the user left it open: by memory, alike on all ranks, without a change of numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from live_storages import LiveStorages
from short_runs import UNSET, dataset, log_rows, relative_difference, trainer, weights
from tiny_models import tiny_model
from transformers import TrainerCallback

from prefopt import DPOConfig
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.head.plan import uncached
from prefopt.trainer import preparing
from prefopt.trainer.memory import SAFE_SHARE, ActivationModel

NAMES = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(DPOConfig, name)]
RECOMPUTED = 1e-6
"""Relative norm of weights: a recomputed layer gives the same float32 numbers, sums of gradients may be in another
order."""
PEAK = 0.2
"""Relative: gradients between two layers are not estimated, and the tiny model has few layers to spread them over."""


def checkpointing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class Watch(TrainerCallback):
    """Whether layers recompute while training runs, and what the arguments say then."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = checkpointing(kwargs["model"])
        self.said = {name: getattr(args, name) for name in NAMES}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The free memory that the trainer finds; how often it asked for an estimate."""
    found = {"bytes": 1e12, "trials": 0}
    monkeypatch.setattr(preparing, "free_bytes", lambda device, processes: found["bytes"])
    run_trials = preparing.run_trials

    def counted(*args: Any, **kwargs: Any) -> Any:
        found["trials"] += 1
        return run_trials(*args, **kwargs)

    monkeypatch.setattr(preparing, "run_trials", counted)
    return found


def run(folder: Path, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    options = {"gradient_checkpointing": UNSET, "max_steps": 2, "use_cpu": True, "callbacks": [watch], **options}
    made = trainer(folder, **options)
    made.train()
    return made, watch


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_memory_decides(
    room: bool, method: str, tmp_path: Path, free: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prefopt")
    free["bytes"] = 1e12 if room else 1e4
    made, watch = run(tmp_path, method=method)
    assert watch.on is not room
    assert watch.said == dict.fromkeys(NAMES, not room)
    assert not any(made.args.was_set(name) for name in NAMES)
    (line,) = [record.message for record in caplog.records if record.message.startswith("activation checkpointing")]
    assert f"checkpointing: {'off' if room else 'on'} (" in line
    assert "set gradient_checkpointing to decide yourself" in line


def test_the_threshold_is_the_estimate(tmp_path: Path, free: dict[str, Any]) -> None:
    made = trainer(tmp_path)
    estimate = made.memory_estimate(made.trials())
    states_and_gradients = 3 * sum(p.nbytes for p in made.model.parameters())
    assert estimate.training == states_and_gradients
    needed = (estimate.activations + states_and_gradients) / SAFE_SHARE
    for share, on in ((1.001, False), (0.999, True)):
        free["bytes"] = share * needed
        assert run(tmp_path)[1].on is on


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "later"), [(True, False), (False, False), (False, True)])
def test_the_users_word_holds(name: str, value: bool, later: bool, tmp_path: Path, free: dict[str, Any]) -> None:
    """Set in the constructor or assigned afterwards, under either name."""
    free["bytes"] = 1e12 if value else 1e4  # memory would decide the other way
    watch = Watch()
    options = {"gradient_checkpointing": UNSET, "max_steps": 1, "callbacks": [watch]}
    made = trainer(tmp_path, **options | ({} if later else {name: value}))
    if later:
        setattr(made.args, name, value)
    made.train()
    assert watch.on is value
    assert watch.said == dict.fromkeys(NAMES, value)
    assert made.args.was_set(name)
    assert free["trials"] == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_weights_do_not_depend_on_it(reentrant: bool, lora: bool, tmp_path: Path, free: dict[str, Any]) -> None:
    options: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "max_steps": 4}
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    results = []
    for room in (True, False):
        free["bytes"] = 1e12 if room else 1e4
        made, watch = run(tmp_path, **options)
        assert watch.on is not room
        results.append((weights(made.model), log_rows(made)))
    (kept, kept_log), (recomputed, recomputed_log) = results
    assert relative_difference(kept, recomputed) < RECOMPUTED
    for ours, theirs in zip(kept_log, recomputed_log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_resumed_run_decides_again(tmp_path: Path, free: dict[str, Any]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, _ = run(tmp_path / "whole", **options)
    free["bytes"] = 1e4
    watch = Watch()
    resumed = trainer(tmp_path / "part", gradient_checkpointing=UNSET, callbacks=[watch], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert watch.on
    assert relative_difference(weights(resumed.model), weights(whole.model)) < RECOMPUTED


def test_a_second_training_decides_again(tmp_path: Path, free: dict[str, Any]) -> None:
    made, watch = run(tmp_path)
    assert not watch.on
    free["bytes"] = 1e4
    made.train()
    assert watch.on
    free["bytes"] = 1e12
    made.train()
    assert not watch.on


def test_evaluation_measures_nothing(tmp_path: Path, free: dict[str, Any]) -> None:
    trainer(tmp_path, gradient_checkpointing=UNSET, eval_dataset=dataset(4)).evaluate()
    assert free["trials"] == 0


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from prefopt import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(rows)


def arrived_checkpointing() -> Any:
    model = tiny_model(seed=1)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda: {"model": arrived_checkpointing()}, "the model came with it"),
        (lambda: {"data_collator": collate}, "the size of batches is the data collator's affair"),
        (lambda: {"rows": dataset().to_iterable_dataset(), "max_length": None}, "streamed rows"),
    ],
)
def test_it_stays_on_where_memory_cannot_be_told(
    options: Any, reason: str, tmp_path: Path, free: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prefopt")
    _, watch = run(tmp_path, **options())
    assert watch.on
    assert any(reason in record.message for record in caplog.records)
    assert free["trials"] == 0


def test_an_unknown_device_keeps_it_on(tmp_path: Path, free: dict[str, Any]) -> None:
    free["bytes"] = None
    assert run(tmp_path)[1].on


def test_the_largest_micro_batch_of_a_run(tmp_path: Path) -> None:
    rows = dataset(40)
    for layout in ("shared_prompt", "packed"):
        made = trainer(tmp_path, rows=rows, layout=layout, max_steps=10)
        sizes = [
            batch.model_inputs["input_ids"].numel()
            for step in made.get_train_dataloader()
            for batch in step.micro_batches
        ]
        assert max(sizes) <= made.largest_batch().tokens <= 4 * made.largest_batch().longest
    padded = trainer(tmp_path, rows=rows, layout="padded").largest_batch()
    assert padded.tokens == 4 * padded.longest
    budget = trainer(tmp_path, rows=rows, layout="packed", tokens_per_batch=50, max_length=64)
    assert budget.largest_batch().tokens == 50
    stream = trainer(tmp_path, rows=rows.to_iterable_dataset(), max_length=64).largest_batch()
    assert (stream.tokens, stream.longest) == (4 * 2 * 64, 2 * 64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_estimate_against_a_real_step(attention: str, tmp_path: Path) -> None:
    """The peak of a training step's live memory, by an account of its own, for the largest micro-batch of a run."""
    model = tiny_model(seed=1, num_hidden_layers=6, attn_implementation=attention)
    made = trainer(tmp_path, model=model, max_steps=1, use_cpu=True, per_device_train_batch_size=8, count=8)
    made.train()
    made.model.zero_grad(set_to_none=True)
    trials = made.trials()
    expected = ActivationModel.fit(trials.counts).bytes(made.largest_batch())
    expected += sum(p.nbytes for p in made.model.parameters())  # the gradients; AdamW's states are there already
    (step,) = list(made.get_train_dataloader())
    batch = step.micro_batches[0]
    live = LiveStorages([*made.model.parameters(), *made.model.buffers(), *batch.model_inputs.values()])
    with segment_attention(*made.models()), live, uncached():
        made.training_step(made.model_wrapped, step)
    assert expected == pytest.approx(live.peak, rel=PEAK)
