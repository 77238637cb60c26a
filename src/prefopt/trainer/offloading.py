"""Activation offloading: what the body of a model keeps for the backward pass waits in the host's memory.

What is moved are storages, not tensors: one that several operations keep moves once, and a view comes back with its
own strides, so that the backward computes what it would have computed, bit by bit. Copies run on a stream beside the
computation, out while the next layers are computed, and back before the layers that need them.

Not moved: weights and views of them, what is smaller than `LEAST_BYTES`, and all that is kept outside of the body: the
head keeps gradients of logits only where there is room for them, and they must not travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from prefopt.scoring.encoder_decoder import is_encoder_decoder
from prefopt.scoring.forward import body_of, innermost

__all__ = ["Copies", "StreamCopies", "offloaded", "stream_copies"]

LEAST_BYTES = 1024
"""A smaller storage costs more to move than it frees."""
IN_FLIGHT = 4
"""Storages on their way out that the device still holds. More of them hide slower copies and take more memory."""
AHEAD = 3
"""Storages that are fetched before they are asked for, in the order in which the backward pass should need them."""


class Copies(Protocol):
    """How bytes reach the host and come back."""

    def moves(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where it would be moved from."""
        ...

    def out(self, raw: Tensor) -> Tensor:
        """[bytes] the same bytes in the host's memory."""
        ...

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """[bytes] the same bytes on their way to ``device``, and what says that they are there."""
        ...

    def arrive(self, raw: Tensor, event: Any) -> None:
        """What is computed from here on may use the bytes."""
        ...


class StreamCopies:
    """Copies between an accelerator and pinned memory, on a stream of their own for each device."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.streams: dict[torch.device, torch.Stream] = {}
        self.leaving: deque[tuple[Tensor, torch.Event]] = deque()

    def moves(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device_type

    def beside(self, device: torch.device) -> torch.Stream:
        """The stream of the copies, behind all that was computed up to now."""
        stream = self.streams.setdefault(device, torch.Stream(device))
        stream.wait_stream(torch.accelerator.current_stream(device))
        return stream

    def out(self, raw: Tensor) -> Tensor:
        host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=True)
        stream = self.beside(raw.device)
        with stream:
            host.copy_(raw, non_blocking=True)
        # The memory may be used again only behind the copy. Waiting for the oldest copy gives it back in an order that
        # does not depend on how far the host is ahead of the device, unlike `record_stream`.
        self.leaving.append((raw, stream.record_event()))
        self.wait_for_all_but(IN_FLIGHT)
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self.wait_for_all_but(0)  # the backward pass has begun
        raw = torch.empty(host.shape, dtype=host.dtype, device=device)
        stream = self.beside(device)
        with stream:
            raw.copy_(host, non_blocking=True)
        raw.record_stream(stream)  # it may be dropped without having been asked for
        return raw, stream.record_event()

    def arrive(self, raw: Tensor, event: Any) -> None:
        torch.accelerator.current_stream(raw.device).wait_event(event)

    def wait_for_all_but(self, count: int) -> None:
        while len(self.leaving) > count:
            self.arrive(*self.leaving.popleft())


class Moved:
    """A storage in the host's memory, until the last operation that keeps a view of it is gone.

    Args:
        host: [bytes] its bytes.
        device: where it was.
        order: of the storages of this forward pass, to which it is added.
    """

    def __init__(self, host: Tensor, device: torch.device, order: list[ReferenceType[Moved]], copies: Copies) -> None:
        self.host, self.device, self.copies = host, device, copies
        self.order, self.place = order, len(order)
        self.fetched: tuple[Tensor, Any] | None = None
        order.append(ref(self))

    def fetch(self) -> tuple[Tensor, Any]:
        """Start the way back; once."""
        if self.fetched is None:
            self.fetched = self.copies.back(self.host, self.device)
        return self.fetched

    def bytes(self) -> Tensor:
        """[bytes] on the device again; those that were kept just before it are on their way then."""
        fetched = self.fetch()
        for place in range(self.place - 1, max(-1, self.place - 1 - AHEAD), -1):
            if (earlier := self.order[place]()) is not None:
                earlier.fetch()
        self.copies.arrive(*fetched)
        return fetched[0]


class Offload(saved_tensors_hooks):
    """The hooks of one forward pass.

    Args:
        weights: addresses of the storages that stay.
        copies: how bytes are moved.
    """

    def __init__(self, weights: set[int], copies: Copies) -> None:
        self.weights, self.copies = weights, copies
        self.order: list[ReferenceType[Moved]] = []
        self.known: dict[tuple[StorageWeakRef, int], ReferenceType[Moved]] = {}
        super().__init__(self.pack, self.unpack)

    def stays(self, tensor: Tensor) -> bool:
        """Whether autograd keeps the tensor as it is."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg() or not self.copies.moves(tensor):
            return True
        storage = tensor.untyped_storage()
        return (
            storage.nbytes() < LEAST_BYTES
            or storage.data_ptr() in self.weights
            or isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)  # gathered for this pass
        )

    def pack(self, tensor: Tensor) -> tuple[Moved | Tensor, Any]:
        if self.stays(tensor):
            return tensor.detach(), None  # the tensor itself would keep the operation alive that keeps it
        storage = tensor.untyped_storage()
        key = (StorageWeakRef(storage), tensor._version)
        moved = known() if (known := self.known.get(key)) is not None else None
        if moved is None:
            raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
            moved = Moved(self.copies.out(raw), tensor.device, self.order, self.copies)
            self.known[key] = ref(moved)
        return moved, (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def unpack(self, packed: tuple[Moved | Tensor, Any]) -> Tensor:
        kept, view = packed
        if isinstance(kept, Tensor):
            return kept
        raw, (dtype, offset, size, stride) = kept.bytes(), view
        empty = torch.empty(0, dtype=dtype, device=raw.device)
        return empty.set_(raw.untyped_storage(), offset, size, stride)  # type: ignore[call-overload]


@contextmanager
def offloaded(model: nn.Module, copies: Copies | None) -> Iterator[None]:
    """Within the context, what the body of ``model`` keeps for a backward pass is moved to the host.

    Args:
        model: wrapped or not.
        copies: how; None: nothing is moved.
    """
    if copies is None:
        yield
        return
    passes = ExitStack()

    def begin(*_: Any) -> None:
        passes.enter_context(Offload(addresses(model), copies) if torch.is_grad_enabled() else nullcontext())

    def end(*_: Any) -> None:
        passes.close()

    handles = []
    for body in bodies_of(innermost(model)):
        handles.append(body.register_forward_pre_hook(begin))
        handles.append(body.register_forward_hook(end, always_call=True))  # also where the forward pass fails
    try:
        yield
    finally:
        end()
        for handle in handles:
            handle.remove()


def bodies_of(model: Any) -> list[nn.Module]:
    """The modules that compute hidden states: one, or encoder and decoder."""
    if is_encoder_decoder(model.config):
        return [model.get_encoder(), model.get_decoder()]
    return [body_of(model)]


def addresses(model: nn.Module) -> set[int]:
    """Of the storages of all weights and buffers; of a sharded one, of the part that lies here."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return {getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr() for tensor in tensors}


def stream_copies(device: torch.device) -> StreamCopies | None:
    """Copies from and to a device with memory and streams of its own; None where there is nothing to move."""
    has_streams = hasattr(torch.get_device_module(device), "Stream") and device.type not in ("cpu", "mps")
    return StreamCopies(device.type) if has_streams else None
