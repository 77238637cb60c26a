"""The reference is what the policy starts from, whatever the policy is made of, and stays so while it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from reference_models import (
    IDENTITIES,
    OTHERS,
    adapted,
    batch_of,
    log_probs,
    lora,
    policy_stats,
    rows,
    shake,
    tiny_llama,
    train,
    two_adapters,
)
from torch.testing import assert_close

from prefopt.reference import Precomputed, check_identity, make_reference
from prefopt.reference.policy import AdapterOff, NamedAdapter, SeparateModel, StartingWeights
from prefopt.scoring.forward import score
from prefopt.types import PAIR

EXACT = {"rtol": 1e-6, "atol": 1e-6}
ADAPTERS = {**IDENTITIES, **OTHERS}


def state(model: torch.nn.Module) -> dict[str, Any]:
    """All that a reference pass must leave as it was."""
    weights = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    return {
        "weights": weights,
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "active": [list(m.active_adapters) for m in model.modules() if hasattr(m, "adapter_layer_names")],
        "off": [m.disable_adapters for m in model.modules() if hasattr(m, "adapter_layer_names")],
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("trainable", "training", "active", "off"):
        assert before[key] == after[key], key
    for name, (pointer, values) in before["weights"].items():
        assert pointer == after["weights"][name][0], name
        assert torch.equal(values, after["weights"][name][1]), name


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("updates", [False, True])
def test_equals_the_policy_at_the_start_and_not_after_training(kind: str, updates: bool) -> None:
    model = ADAPTERS[kind]()
    batch = batch_of()
    reference = make_reference(model, updates=updates)
    assert reference.derives_from_policy
    start = log_probs(policy_stats(model.eval(), batch))
    assert_close(log_probs(reference(batch)), start, **EXACT)
    check_identity(policy_stats(model, batch), reference(batch), rows=batch.rows, dtype=torch.float32)

    train(model)
    assert (log_probs(policy_stats(model, batch)) - start).abs().max() > 0.01, "training changed nothing"
    assert_close(log_probs(reference(batch)), start, **EXACT)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_pass_leaves_the_policy_as_it_was(kind: str) -> None:
    model = ADAPTERS[kind]()
    reference = make_reference(model)
    train(model, steps=1)
    model.train()
    before = state(model)
    reference(batch_of())
    assert_same_state(before, state(model))


@pytest.mark.parametrize("kind", ["new LoRA", "trained LoRA", "bias all", "two active adapters"])
def test_a_failed_pass_leaves_the_policy_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ADAPTERS[kind]()
    reference = make_reference(model)
    train(model, steps=1)
    before = state(model)

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr("prefopt.reference.policy.score", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        reference(batch_of())
    assert_same_state(before, state(model))


@pytest.mark.parametrize("kind", IDENTITIES)
def test_an_identity_costs_nothing(kind: str) -> None:
    assert isinstance(make_reference(IDENTITIES[kind]()), AdapterOff)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_identity_is_copied(kind: str) -> None:
    assert isinstance(make_reference(OTHERS[kind]()), StartingWeights)


@pytest.mark.parametrize("kind", ["PiSSA", "OLoRA", "trained LoRA", "trained modules_to_save"])
def test_switching_the_adapter_off_would_not_be_the_reference(kind: str) -> None:
    """Guards the rule: if these were identities, the copies above would show nothing."""
    model = OTHERS[kind]()
    batch = batch_of()
    off = AdapterOff(model)(batch)
    assert (log_probs(policy_stats(model, batch)) - log_probs(off)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in ("prompt tuning", "prefix tuning")])
def test_off_means_what_it_means_in_peft(kind: str) -> None:
    model = ADAPTERS[kind]()
    if kind in IDENTITIES:
        shake(model)
    batch = batch_of()
    ours = log_probs(AdapterOff(model)(batch))
    with model.disable_adapter():
        theirs = log_probs(policy_stats(model, batch))
    assert torch.equal(ours, theirs)


def test_gradients_do_not_depend_on_when_the_reference_is_asked() -> None:
    """Between the policy's forward and its backward the weights are exchanged: the graph must not notice."""
    gradients = []
    for asked_between in (False, True):
        model = adapted(lora(modules_to_save=["lm_head"]), trained=True)
        reference = make_reference(model)
        shake(model)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
        batch = batch_of()
        loss = score(model, batch).tokens.logps.sum()
        if asked_between:
            reference(batch)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert gradients[0]
    for without, with_pass in zip(*gradients, strict=True):
        assert torch.equal(without, with_pass)


@pytest.mark.parametrize("trainable", [True, False])
def test_an_adapter_loaded_from_disk(trainable: bool, tmp_path: Path) -> None:
    adapted(lora(modules_to_save=["lm_head"]), trained=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
    batch = batch_of()
    reference = make_reference(model)
    assert isinstance(reference, StartingWeights)
    model.set_adapter("default")  # what makes a frozen adapter trainable afterwards
    start = log_probs(policy_stats(model, batch))
    train(model)
    assert (log_probs(policy_stats(model, batch)) - start).abs().max() > 0.01
    assert_close(log_probs(reference(batch)), start, **EXACT)


def test_a_second_adapter_on_a_trained_one() -> None:
    """The first stays active and frozen, the second is new: the reference has the first in force."""
    model = two_adapters(both=True)
    for name, parameter in model.named_parameters():
        if ".first." in name:
            parameter.requires_grad_(False)
        if "lora_B.second" in name:
            parameter.data.zero_()
    batch = batch_of()
    reference = make_reference(model)
    start = log_probs(policy_stats(model, batch))
    train(model)
    assert_close(log_probs(reference(batch)), start, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_has_a_snapshot(dtype: torch.dtype) -> None:
    """Also of a model that was changed in memory, and that no path leads to."""
    model = tiny_llama(dtype=dtype)
    shake(model)
    batch = batch_of()
    reference = make_reference(model.train())
    assert isinstance(reference, SeparateModel)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert not reference.model.training
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    start = log_probs(policy_stats(model, batch))
    assert_close(log_probs(reference(batch)), start, **EXACT)
    train(model)
    assert_close(log_probs(reference(batch)), start, **EXACT)


def test_a_snapshot_of_a_model_that_can_score_is_independent() -> None:
    model = tiny_llama()
    batch = batch_of()
    start = log_probs(policy_stats(model, batch))  # installs scoring on the model, which the copy inherits
    reference = make_reference(model)
    shake(model)
    assert_close(log_probs(reference(batch)), start, **EXACT)


def test_the_reference_has_no_dropout() -> None:
    model = adapted(lora(lora_dropout=0.5), trained=True).train()
    reference = make_reference(model)
    batch = batch_of()
    first, second = log_probs(reference(batch)), log_probs(reference(batch))
    assert torch.equal(first, second)
    assert not torch.equal(log_probs(policy_stats(model, batch)), first)


@pytest.mark.parametrize("kind", ["full", "PEFT"])
def test_a_given_model_is_the_reference(kind: str) -> None:
    given = tiny_llama(seed=9) if kind == "full" else adapted(lora(), trained=True, seed=9)
    batch = batch_of()
    wanted = log_probs(policy_stats(given, batch))
    reference = make_reference(tiny_llama(), given)
    assert not reference.derives_from_policy
    assert_close(log_probs(reference(batch)), wanted, **EXACT)
    assert not any(parameter.requires_grad for parameter in given.parameters())


def test_the_policy_itself_given_as_reference_is_a_snapshot() -> None:
    model = tiny_llama()
    reference = make_reference(model, model)
    assert isinstance(reference, SeparateModel)
    assert reference.model is not model
    assert reference.derives_from_policy


def test_a_given_model_and_an_adapter_that_acts_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_reference(adapted(lora()), tiny_llama())
        assert not caplog.records
        make_reference(adapted(lora(), trained=True, name="mine"), tiny_llama())
    assert "'mine' already changes the model" in caplog.text


def test_force_use_ref_model_gives_a_peft_policy_a_model_of_its_own() -> None:
    model = adapted(lora(), trained=True)
    batch = batch_of()
    reference = make_reference(model, force_use_ref_model=True)
    assert isinstance(reference, SeparateModel)
    start = log_probs(policy_stats(model, batch))
    shake(model)
    assert_close(log_probs(reference(batch)), start, **EXACT)


def test_a_named_adapter_is_the_reference() -> None:
    model = two_adapters()
    batch = batch_of()
    model.set_adapter("first")
    wanted = log_probs(policy_stats(model, batch))
    model.set_adapter("second")
    reference = make_reference(model, ref_adapter_name="first")
    assert isinstance(reference, NamedAdapter)
    next(p for name, p in model.named_parameters() if ".second." in name).requires_grad_(False)
    before = state(model)
    assert_close(log_probs(reference(batch)), wanted, **EXACT)
    assert_same_state(before, state(model))


def test_model_adapter_name_activates_the_adapter() -> None:
    model = two_adapters()
    make_reference(model, model_adapter_name="first", ref_adapter_name="second")
    assert model.active_adapters == ["first"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_llama, {"ref_adapter_name": "first"}, "no adapters"),
        (two_adapters, {"ref_adapter_name": "frist"}, "'first', 'second'"),
        (two_adapters, {"model_adapter_name": "third"}, "`model_adapter_name` is 'third'"),
        (two_adapters, {"ref_adapter_name": "second"}, "the adapter being trained"),
        (two_adapters, {"ref_adapter_name": "first", "ref_model": "given"}, "Both `ref_model` and"),
        (two_adapters, {"ref_adapter_name": "first", "updates": True}, "`ref_adapter_name` is set"),
        (tiny_llama, {"precomputed": True, "updates": True}, "`precompute_ref_log_probs` or the column"),
    ],
)
def test_contradictions_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    if "ref_model" in options:
        options = {**options, "ref_model": tiny_llama()}
    with pytest.raises(ValueError, match=message):
        make_reference(model(), **options)


def test_ld_alpha_reaches_the_reference() -> None:
    model = tiny_llama()
    batch = batch_of()
    reference = make_reference(model, ld_alpha=0.25)
    assert_close(log_probs(reference(batch)), log_probs(policy_stats(model, batch, ld_alpha=0.25)), **EXACT)
    assert not torch.equal(log_probs(reference(batch)), log_probs(policy_stats(model, batch)))


def test_precomputed_reads_the_batch() -> None:
    from dataclasses import replace

    sums = {branch: torch.arange(4, dtype=torch.float64) + i for i, branch in enumerate(PAIR)}
    batch = replace(batch_of(), ref_sum_logps=sums)
    stats = Precomputed()(batch)
    for branch in PAIR:
        assert stats[branch].sum_logps.dtype == torch.float32
        assert torch.equal(stats[branch].sum_logps, sums[branch].float())
        assert stats[branch].num_tokens.tolist() == [len(row[f"{branch}_ids"]) for row in rows()]


def test_precomputed_asks_its_source_or_names_the_rows() -> None:
    model = tiny_llama()
    reference = make_reference(model, precomputed=True)
    assert isinstance(reference, Precomputed)
    assert not reference.derives_from_policy
    batch = batch_of()
    start = log_probs(policy_stats(model, batch))
    shake(model)
    assert_close(log_probs(reference(batch)), start, **EXACT)
    with pytest.raises(ValueError, match=r"Rows \[0, 1, 2, 3\] have no reference log-probs"):
        Precomputed()(batch)


def test_weights_survive_a_checkpoint() -> None:
    model = adapted(lora(), trained=True)
    reference = make_reference(model, updates=True)
    saved = {name: tensor.clone() for name, tensor in reference.weights().items()}
    wanted = log_probs(reference(batch_of()))
    shake(model)
    later = make_reference(model, updates=True)
    assert not torch.allclose(log_probs(later(batch_of())), wanted)
    later.load_weights(saved)
    assert torch.equal(log_probs(later(batch_of())), wanted)
    saved.popitem()
    with pytest.raises(ValueError, match="does not fit"):
        later.load_weights(saved)


def test_adapter_off_has_no_weights_to_update() -> None:
    with pytest.raises(ValueError, match="AdapterOff, which has no weights"):
        make_reference(adapted(lora())).weights()
