"""TR-DPO and BEMA as callbacks: at which steps they act, on what, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from prefopt.reference import make_reference, named_weights
from prefopt.trainer.callbacks import BEMACallback, SyncReferenceCallback


def full() -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))


def adapted() -> Any:
    model = get_peft_model(full(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "mine")
    move(model, 0.1)
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in named_weights(model).items() if p.requires_grad}


@torch.no_grad()
def move(model: Any, by: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by)


def run(callback: Any, model: Any, args: Any, steps: int, each: Callable[[int], None] = lambda step: None) -> None:
    """A training loop in which every trained weight grows by 1 in each step."""
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    for step in range(1, steps + 1):
        move(model, 1.0)
        state.global_step = step
        callback.on_step_end(args, state, control, model=model)
        each(step)
    callback.on_train_end(args, state, control, model=model)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)


@pytest.mark.parametrize("make", [full, adapted])
def test_reference_follows_every_second_step(make: Callable[[], Any]) -> None:
    """From r: at step 2 r + 0.25 * 2 = r + 0.5; at step 4 r + 0.5 + 0.25 * (4 - 0.5) = r + 1.375."""
    model = make()
    reference = make_reference(model, updates=True)
    start = {name: tensor.clone() for name, tensor in reference.weights().items()}
    callback = SyncReferenceCallback(reference, SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.25))
    moved = {0: 0.0, 1: 0.0, 2: 0.5, 3: 0.5, 4: 1.375}

    def check(step: int) -> None:
        for name, tensor in reference.weights().items():
            torch.testing.assert_close(tensor, start[name] + moved[step])

    run(callback, model, None, 4, check)


def test_the_policy_may_be_wrapped() -> None:
    model = full()
    reference = make_reference(model, updates=True)
    callback = SyncReferenceCallback(reference, SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=1.0))
    move(model, 1.0)
    state = TrainerState(global_step=1)
    callback.on_step_end(None, state, TrainerControl(), model=torch.nn.DataParallel(model))
    for name, tensor in reference.weights().items():
        assert torch.equal(tensor, model.get_parameter(name))


def test_bema_steps(args: TrainingArguments) -> None:
    """update_after 2, every 3: theta_0 anew at step 2, updates at 5 and 8, with the weights of those steps.

    theta_t = theta + t. beta = 0.5 by its lower bound, alpha = 1. At 5: E = 2 + 0.5 * 3 = 3.5, theta' = 3.5 + 3 = 6.5.
    At 8: E = 3.5 + 0.5 * 4.5 = 5.75, theta' = 5.75 + 6 = 11.75.
    """
    model = full()
    start = trained(model)
    callback = BEMACallback(3, ema_power=9.0, bias_power=0.0, update_after=2, min_ema_multiplier=0.5)
    moved = {1: 0, 2: 0, 3: 0, 4: 0, 5: 6.5, 6: 6.5, 7: 6.5, 8: 11.75, 9: 11.75}

    def check(step: int) -> None:
        for name, tensor in callback.average.average.items():
            torch.testing.assert_close(tensor, start[name] + moved[step])

    run(callback, model, args, 9, check)


def test_the_schedule_counts_optimizer_steps(args: TrainingArguments) -> None:
    """At step 6 with lag 10: beta = 16^-0.5 = 0.25; theta' = 0.25 * 6 + 16^-0.25 * 6 = 1.5 + 3 = 4.5."""
    model = full()
    start = trained(model)
    callback = BEMACallback(update_freq=6, bias_power=0.25)
    run(callback, model, args, 6)
    for name, tensor in callback.average.average.items():
        torch.testing.assert_close(tensor, start[name] + 4.5)


@pytest.mark.parametrize("make", [full, adapted])
def test_the_average_is_saved_and_the_model_untouched(make: Callable[[], Any], args: TrainingArguments) -> None:
    model = make()
    start = trained(model)
    callback = BEMACallback(update_freq=2, ema_power=0.0, bias_power=0.0)  # theta' = theta + (theta - theta_0)
    run(callback, model, args, 2)
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, start[name] + 2)
    folder = Path(args.output_dir) / "bema"
    if make is full:
        saved = LlamaForCausalLM.from_pretrained(folder)
    else:
        saved = PeftModel.from_pretrained(full(), folder / "mine", adapter_name="mine", is_trainable=True)
    for one in (saved, callback.running_model):
        for name, tensor in trained(one).items():
            torch.testing.assert_close(tensor, start[name] + 4)


@pytest.mark.parametrize("make", [full, adapted])
def test_the_average_becomes_the_reference(make: Callable[[], Any], args: TrainingArguments) -> None:
    """Average at 2 and 4, reference at 3 and 5 (after 1, every 2): it takes what the average is by then."""
    model = make()
    start = trained(model)
    options = {"update_ref_model": True, "ref_model_update_freq": 2, "ref_model_update_after": 1}
    callback = BEMACallback(2, ema_power=0.0, bias_power=0.0, **options)
    callback.reference = reference = make_reference(model, updates=True)
    moved = {1: 0, 2: 0, 3: 4, 4: 4, 5: 8}

    def check(step: int) -> None:
        weights = reference.weights()
        for name, tensor in start.items():
            torch.testing.assert_close(weights[name], tensor + moved[step])

    run(callback, model, args, 5, check)


def test_frozen_weights_of_the_reference_stay(args: TrainingArguments) -> None:
    model = full()
    model.lm_head.requires_grad_(False)
    before = model.lm_head.weight.detach().clone()
    callback = BEMACallback(1, update_ref_model=True, ref_model_update_freq=1)
    callback.reference = reference = make_reference(model, updates=True)
    run(callback, model, args, 2)
    assert torch.equal(reference.weights()["lm_head.weight"], before)


def test_without_a_reference_it_says_so(args: TrainingArguments) -> None:
    with pytest.raises(ValueError, match="no reference that can be updated"):
        run(BEMACallback(update_ref_model=True), full(), args, 1)


def test_a_resumed_average_goes_on(args: TrainingArguments) -> None:
    whole, model = BEMACallback(update_freq=2), full()
    run(whole, model, args, 4)

    first, model = BEMACallback(update_freq=2), full()
    run(first, model, args, 2)
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = BEMACallback(update_freq=2)
    assert second.state_dict() == {}
    second.load_state_dict(saved)
    state, control = TrainerState(global_step=2), TrainerControl()
    second.on_train_begin(args, state, control, model=model)
    for step in (3, 4):
        move(model, 1.0)
        state.global_step = step
        second.on_step_end(args, state, control, model=model)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_second_training_starts_anew(args: TrainingArguments) -> None:
    callback, model = BEMACallback(update_freq=1), full()
    run(callback, model, args, 2)
    start = trained(model)
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    for name, tensor in start.items():
        assert torch.equal(callback.average.average[name], tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_freq": 0}, "`update_freq` is 0"),
        ({"ref_model_update_freq": -1}, "`ref_model_update_freq` is -1"),
        ({"lag": -1, "multiplier": 1.0}, r"`lag` \(-1\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BEMACallback(**options)


def test_there_is_no_average_before_training() -> None:
    with pytest.raises(ValueError, match="before training begins"):
        _ = BEMACallback().running_model


@pytest.mark.trl
def test_as_in_trl(args: TrainingArguments) -> None:
    trl = pytest.importorskip("trl")
    options = {"update_freq": 3, "update_after": 2, "ema_power": 0.4, "bias_power": 0.3, "lag": 5, "multiplier": 0.7}
    ours, theirs = BEMACallback(**options), trl.BEMACallback(**options)
    run(ours, full(), args, 12)
    run(theirs, full(), args, 12)
    expected = theirs.running_model.state_dict()
    for name, tensor in ours.running_model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
