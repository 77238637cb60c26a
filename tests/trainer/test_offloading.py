"""Activation offloading: gradients stay what they were, bit by bit, and what should move moves.

A stand-in moves CPU tensors to other CPU tensors, so that all but the streams is tested without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from families import LAYOUTS, checkpointed, groups, objective, reference_of, tiny
from short_runs import trainer, weights
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from prefopt.normalise import local_counts, total
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import innermost
from prefopt.step import preference_step
from prefopt.trainer import base, offloading
from prefopt.trainer.offloading import AHEAD, IN_FLIGHT, LEAST_BYTES, Offload, StreamCopies, addresses, offloaded

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: streams and pinned memory are its")


class CpuCopies:
    """Copies within the memory of the host; counts them."""

    def __init__(self) -> None:
        self.moved: list[int] = []
        self.returned = 0
        self.on_device: WeakSet[Tensor] = WeakSet()

    def moves(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def out(self, raw: Tensor) -> Tensor:
        self.moved.append(raw.nbytes)
        return raw.clone()

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self.returned += 1
        raw = host.clone()
        self.on_device.add(raw)
        return raw, None

    def arrive(self, raw: Tensor, event: Any) -> None:
        pass


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(model: Any, reference: Any, batch: Any, method: str, copies: Any) -> Tensor:
    """[all trained weights] of one micro-batch."""
    wanted = objective(method)
    model.zero_grad()
    with segment_attention(model, reference.model), offloaded(model, copies):
        result = preference_step(model, reference, batch, wanted)
        total(result.terms, batch, local_counts([batch])).backward()
    found: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([getattr(gradient, "_local_tensor", gradient).flatten() for gradient in found])


def made(family: str, lora: bool) -> tuple[Any, Any]:
    model: Any = tiny(family)
    reference = reference_of(model)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        reference = reference_of(model)
    return model.train(), reference


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("recomputing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_same_bit_by_bit(layout: str, recomputing: bool | None, lora: bool) -> None:
    model, reference = made("llama", lora)
    if recomputing is not None:
        checkpointed(innermost(model), use_reentrant=recomputing)
        innermost(model).enable_input_require_grads()
    batch = LAYOUTS[layout](groups(3), ("chosen", "rejected"))
    copies = CpuCopies()
    expected = gradients(model, reference, batch, "dpo", None)
    found = gradients(model, reference, batch, "dpo", copies)
    assert torch.equal(found, expected)
    assert copies.moved
    assert copies.returned == len(copies.moved)  # what is shared goes once each way
    assert min(copies.moved) >= LEAST_BYTES


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "gpt_oss"])
def test_other_families(family: str) -> None:
    """Windows, routers and sinks keep views, indices and expanded tensors."""
    model, reference = made(family, lora=False)
    batch = LAYOUTS["shared_prompt"](groups(5), ("chosen", "rejected", "gold"))
    expected = gradients(model, reference, batch, "tpo", None)
    copies = CpuCopies()
    assert torch.equal(gradients(model, reference, batch, "tpo", copies), expected)
    assert copies.moved


def test_with_checkpointing_only_the_inputs_of_layers_move() -> None:
    model, reference = made("llama", lora=False)
    batch = LAYOUTS["shared_prompt"](groups(3), ("chosen", "rejected"))
    copies = CpuCopies()
    gradients(model, reference, batch, "dpo", copies)
    of_all = sum(copies.moved)
    checkpointed(model, use_reentrant=False)
    copies = CpuCopies()
    gradients(model, reference, batch, "dpo", copies)
    hidden = batch.model_inputs["input_ids"].numel() * model.config.hidden_size * 4
    assert copies.moved.count(hidden) >= model.config.num_hidden_layers
    assert sum(copies.moved) < of_all / 3


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recomputing", [None, False], ids=["kept", "checkpointed"])
def test_in_a_wrapper(wrapper: str, recomputing: bool | None, one_rank: None) -> None:
    """The same storages move as without: the weights that FSDP2 brings together for a layer do not."""
    model, reference = made("llama", lora=False)
    if recomputing is not None:
        checkpointed(model, use_reentrant=recomputing)
    batch = LAYOUTS["shared_prompt"](groups(3), ("chosen", "rejected"))
    gradients(model, reference, batch, "dpo", bare := CpuCopies())
    if wrapper == "ddp":
        wrapped: Any = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            wrapped = fully_shard(part, mesh=mesh)
    expected = gradients(wrapped, reference, batch, "dpo", None)
    assert torch.equal(gradients(wrapped, reference, batch, "dpo", copies := CpuCopies()), expected)
    assert copies.moved == bare.moved


# -- what is moved -----------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """Keeps a weight, a small tensor, one tensor for three operations, and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.weight)  # tanh keeps its output
        left, right = hidden.sin(), hidden.cos()  # which sin and cos keep too
        small = (self.scale * 2).exp()
        return (left * right.T).sum() * small.sum()


def kept(body: Body, copies: Any) -> tuple[Tensor, list[Tensor]]:
    x = torch.linspace(-1, 1, 32 * 32).view(32, 32)
    with Offload(addresses(body), copies):
        loss = body(x)
    gradients = torch.autograd.grad(loss, list(body.parameters()))
    return loss.detach(), list(gradients)


def test_a_storage_moves_once_and_weights_do_not() -> None:
    torch.manual_seed(0)
    body, copies = Body(), CpuCopies()
    loss, found = kept(body, copies)
    assert len(copies.moved) == 4  # x, hidden, left, right; not the weight, its view, or the scale
    assert set(copies.moved) == {32 * 32 * 4}

    class Nothing(CpuCopies):
        def moves(self, tensor: Tensor) -> bool:
            return False

    expected_loss, expected = kept(body, Nothing())
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_views_come_back_with_their_strides() -> None:
    copies = CpuCopies()
    base = torch.randn(64, 64)
    views = [base.T, base[::2, 1:], base[3].expand(8, 64), base.view(-1)[5:900], base.to(torch.bfloat16)[:, 7:9]]
    hooks = Offload(set(), copies)
    packed = [hooks.pack(view) for view in views]
    for view, back in zip(views, map(hooks.unpack, packed), strict=True):
        assert torch.equal(back, view)
        assert back.stride() == view.stride()
        assert back.dtype == view.dtype
        assert back.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert copies.moved == [64 * 64 * 4, 64 * 64 * 2]


def test_a_tensor_that_was_changed_is_another() -> None:
    hooks, x = Offload(set(), CpuCopies()), torch.zeros(1024)
    before = hooks.pack(x)
    x.add_(1)
    after = hooks.pack(x)
    assert hooks.unpack(before).sum() == 0
    assert hooks.unpack(after).sum() == 1024


def test_storages_are_fetched_ahead_and_dropped_with_their_operation() -> None:
    hooks = Offload(set(), copies := CpuCopies())
    tensors = [torch.full((1024,), float(i)) for i in range(8)]
    packed: list[Any] = [hooks.pack(tensor) for tensor in tensors]
    assert hooks.unpack(packed[7]).sum() == 7 * 1024
    assert copies.returned == 1 + AHEAD
    assert hooks.unpack(packed[6]).sum() == 6 * 1024
    assert copies.returned == 2 + AHEAD  # one more is on its way, none twice
    del packed[1:]
    gc.collect()
    assert len(copies.on_device) == 0  # the first was not fetched yet


class FakeStream:
    """What streams are told, in order."""

    said: ClassVar[list[Any]] = []

    def __init__(self, device: Any = None, name: str = "copies") -> None:
        self.name, self.events = name, 0

    def __enter__(self) -> None:
        self.said.append("copy")

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        self.said.append(f"{self.name} wait for {other.name}")

    def record_event(self) -> int:
        self.events += 1
        return self.events

    def wait_event(self, event: int) -> None:
        self.said.append(f"{self.name} waits for {event}")


def test_what_the_streams_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy follows what was computed; memory is used again behind the copy four storages ago."""
    computation = FakeStream(name="computation")
    like_torch = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("Tensor", "device")},
        empty=lambda *shape, pin_memory=False, **options: torch.empty(*shape, **options),
        Stream=FakeStream,
        accelerator=SimpleNamespace(current_stream=lambda device: computation),
    )
    monkeypatch.setattr(offloading, "torch", like_torch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(FakeStream, "said", said := [])
    copies, raws = StreamCopies("cpu"), [torch.full((1024,), n, dtype=torch.uint8) for n in range(6)]
    hosts = [copies.out(raw) for raw in raws]
    one_copy = ["copies wait for computation", "copy"]
    assert said == [*one_copy * 5, "computation waits for 1", *one_copy, "computation waits for 2"]
    assert len(copies.leaving) == IN_FLIGHT
    said.clear()
    raw, event = copies.back(hosts[5], torch.device("cpu"))
    copies.arrive(raw, event)
    assert said == [*(f"computation waits for {n}" for n in (3, 4, 5, 6)), *one_copy, "computation waits for 7"]
    assert torch.equal(raw, raws[5])


def test_nothing_stays_hooked_after_an_error() -> None:
    model = tiny("llama")
    body = innermost(model).base_model

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = body.layers[0].register_forward_hook(fail)
    copies = CpuCopies()
    with pytest.raises(RuntimeError, match="stop"), offloaded(model, copies):
        model(input_ids=torch.ones(1, 40, dtype=torch.long))
    handle.remove()
    count = len(copies.moved)
    (torch.randn(64, 64, requires_grad=True).exp()).sum().backward()
    assert len(copies.moved) == count
    assert not body._forward_hooks
    assert not body._forward_pre_hooks


# -- in runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> CpuCopies:
    """Runs with ``activation_offloading=True`` move CPU tensors."""
    copies = CpuCopies()
    monkeypatch.setattr(base, "stream_copies", lambda device: copies)
    return copies


@pytest.mark.filterwarnings("ignore:.*activation_offloading=True has no effect on a CPU")
@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_offloading_changes_no_run(method: str, tmp_path: Path, on_cpu: CpuCopies) -> None:
    whole = trainer(tmp_path / "without", method, max_steps=3, gradient_accumulation_steps=2)
    whole.train()
    assert not on_cpu.moved
    run = trainer(tmp_path / "with", method, max_steps=3, gradient_accumulation_steps=2, activation_offloading=True)
    run.train()
    assert on_cpu.moved
    assert torch.equal(weights(run.model), weights(whole.model))


def test_on_a_cpu_it_has_no_effect_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="activation_offloading=True has no effect on a CPU"):
        run = trainer(tmp_path, max_steps=1, activation_offloading=True)
    run.train()
    assert run.state.global_step == 1


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@ON_GPU
@pytest.mark.parametrize("recomputing", [None, False], ids=["kept", "checkpointed"])
def test_gradients_on_a_gpu(recomputing: bool | None) -> None:
    model, reference = made("llama", lora=False)
    model.cuda()
    reference.model.cuda()
    if recomputing is not None:
        checkpointed(model, use_reentrant=recomputing)
    batch = LAYOUTS["shared_prompt"](groups(3), ("chosen", "rejected")).to(torch.device("cuda"))
    expected = gradients(model, reference, batch, "dpo", None)
    for _ in range(3):
        assert torch.equal(gradients(model, reference, batch, "dpo", StreamCopies("cuda")), expected)


@ON_GPU
def test_memory_on_a_gpu() -> None:
    """Of sixty layers that each keep 16 MiB, the device holds a few."""
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(60)]).cuda()
    x = torch.randn(16384, 256, device="cuda")

    def peak(hooks: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with hooks:
            loss = layers(x).sum()
        loss.backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    before = torch.cuda.memory_allocated()
    plain = peak(nullcontext()) - before
    layers.zero_grad()
    moved = peak(Offload(addresses(layers), StreamCopies("cuda"))) - before
    assert moved < plain / 3
