"""Exchanging weights for a pass: in plain tensors by pointer, in sharded ones by value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference_models import adapted, batch_of, log_probs, lora, policy_stats, shake, tiny_llama
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from prefopt.reference import make_reference, named_weights, soft_update, swapped
from prefopt.scoring.forward import score


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_do_not_depend_on_wrappers() -> None:
    model = tiny_llama()
    names = named_weights(model).keys()
    assert named_weights(torch.compile(model)).keys() == names


def test_swapped_restores_after_an_error() -> None:
    model = tiny_llama()
    before = model.lm_head.weight.detach().clone()

    def fail() -> None:
        with swapped(model, {"lm_head.weight": torch.zeros(64, 32)}):
            assert model.lm_head.weight.abs().sum() == 0
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(model.lm_head.weight, before)


def test_swapped_takes_the_type_of_the_parameter() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    with swapped(model, {"lm_head.weight": torch.ones(64, 32)}):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert (model.lm_head.weight == 1).all()


def test_swapped_names_what_is_not_there() -> None:
    with (
        pytest.raises(ValueError, match=r"no parameter 'head.weight'"),
        swapped(tiny_llama(), {"head.weight": torch.ones(1)}),
    ):
        pass


def test_zero_3_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"), swapped(model, {"lm_head.weight": torch.ones(64, 32)}):
        pass


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def full_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in get_model_state_dict(model).items()}


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters() -> None:
    """The copy is taken before sharding and finds its shards afterwards, also for a soft update."""
    model = adapted(lora(modules_to_save=["lm_head"]), trained=True)
    batch = batch_of()
    reference = make_reference(model, updates=True)
    start = log_probs(policy_stats(model, batch))
    sharded(model)
    assert_close(log_probs(reference(batch)), start, rtol=1e-6, atol=1e-6)

    shake(model)
    moved, weights = log_probs(policy_stats(model, batch)), full_weights(model)
    assert (moved - start).abs().max() > 0.01
    assert_close(log_probs(reference(batch)), start, rtol=1e-6, atol=1e-6)
    assert_close(log_probs(policy_stats(model, batch)), moved, rtol=1e-6, atol=1e-6)
    for name, tensor in full_weights(model).items():
        assert torch.equal(tensor, weights[name])

    soft_update(reference.weights(), named_weights(model), 1.0)
    assert_close(log_probs(reference(batch)), moved, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_sharded_gradients_do_not_notice_a_pass_in_between() -> None:
    gradients = []
    for asked_between in (False, True):
        model = adapted(lora(modules_to_save=["lm_head"]), trained=True)
        reference = make_reference(model)
        shake(model)
        sharded(model)
        loss = score(model, batch_of()).tokens.logps.sum()
        if asked_between:
            reference(batch_of())
        loss.backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for without, with_pass in zip(*gradients, strict=True):
        assert torch.equal(without, with_pass)
