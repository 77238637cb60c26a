"""Nested states as two files: their tensors as safetensors, everything else as JSON. Neither runs code when read."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt import files

__all__ = ["has_state", "read_state", "read_tensors", "state_files", "write_state", "write_tensors"]

MARK = "$"
"""Begins the keys of JSON objects that stand for something JSON has not."""
MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size}
NATIVE_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""What every version of safetensors can hold; other types are kept as their bytes."""
WRAPPERS = ("torchao.",)
"""Modules whose tensors are made of others by torch's protocol: the states of optimizers with 4 and 8 bits."""
ARRAY_KINDS = "biufcSUmM"
"""Kinds of numpy types that are plain bytes."""


def state_files(folder: str | Path, name: str) -> tuple[Path, Path]:
    """The two files of a state: tensors, and the rest."""
    return Path(folder, f"{name}.safetensors"), Path(folder, f"{name}.json")


def has_state(folder: str | Path, name: str) -> bool:
    """Whether a state of this name is there, as a whole or in part."""
    return any(path.is_file() for path in state_files(folder, name))


def write_state(state: Any, folder: str | Path, name: str) -> None:
    """Write a state, so that `read_state` gives it back exactly.

    Args:
        state: dicts, lists, tuples, sets, None, bool, int, float, complex, str, bytes, tensors of any type, shape and
            device, numpy arrays and scalars, in any nesting. A tensor that occurs twice is written once.
        folder: which is there.
        name: of the two files, `state_files`.

    Raises:
        TypeError: something else is in it; names its place.
    """
    writer = Writer()
    written = writer.encoded(state, name)
    tensors, rest = state_files(folder, name)
    write_tensors(writer.tensors, tensors)
    files.write_file(rest, json.dumps(written, indent=1, allow_nan=False))


def read_state(folder: str | Path, name: str) -> Any:
    """What `write_state` wrote, with its tensors on the CPU.

    Raises:
        FileNotFoundError: one of the files is missing.
    """
    tensors, rest = state_files(folder, name)
    return decoded(json.loads(rest.read_text()), read_tensors(tensors))


def write_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a file of tensors, on whatever device, of which some may lie in each other's memory."""
    files.announce("write", path)
    save_file({name: apart(tensor) for name, tensor in tensors.items()}, str(path), metadata={"format": "pt"})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    They are copies: the memory of what is mapped from a file would go when the file is cut short, or lost (NFS).
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def apart(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in a memory that holds nothing else."""
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    alone = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if alone else plain.clone()


class Writer:
    """Turns a state into what JSON can hold, and collects its tensors by their place in it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[Any, str] = {}

    def encoded(self, value: Any, place: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if np.isfinite(value) else {f"{MARK}float": repr(value)}
        if kind is list:
            return self.items(value, place)
        if (name := name_of(kind, SEQUENCES)) is not None:
            return {MARK + name: self.items(value, place)}
        if (name := name_of(kind, MAPPINGS)) is not None:
            return self.mapping(value, name, place)
        if kind in (Tensor, nn.Parameter):
            return self.tensor(value, place)
        if isinstance(value, Tensor) and kind.__module__.startswith(WRAPPERS):
            return self.wrapped(value, place)
        if isinstance(value, np.generic | np.ndarray):
            return self.array(value, place)
        for name, (of, write, _) in CODECS.items():
            if kind is of:
                return {MARK + name: write(value)}
        raise TypeError(
            f"The state of this run cannot be kept in a checkpoint: `{place}` is a {kind.__module__}.{kind.__name__}, "
            "and checkpoints hold numbers, text, tensors, arrays, and lists and dicts of them, as anything else would "
            "have to be run as code when it is read. Leave it out of `state_dict()`, turn it into one of these, or "
            "keep the model alone (`save_only_model=True`)."
        )

    def items(self, values: Any, place: str) -> list[Any]:
        return [self.encoded(value, f"{place}.{index}") for index, value in enumerate(values)]

    def mapping(self, value: Any, name: str, place: str) -> dict[str, Any]:
        content = {key: self.encoded(entry, f"{place}.{key}") for key, entry in value.items()}
        if name == "dict" and all(type(key) is str and not key.startswith(MARK) for key in content):
            return content
        return {MARK + name: [[self.encoded(key, f"a key of {place}"), entry] for key, entry in content.items()]}

    def tensor(self, value: Tensor, place: str) -> dict[str, Any]:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(f"`{place}` is a tensor that is sparse, quantised by torch, or without data: {value}")
        description: dict[str, Any] = {f"{MARK}tensor": self.stored(value, place)}
        if value.dtype not in NATIVE_DTYPES:
            description |= {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if type(value) is nn.Parameter:
            description["requires_grad"] = value.requires_grad
        return description

    def stored(self, value: Tensor, place: str) -> str:
        """The name of the tensor in the file, the same one where it was met before."""
        lies = value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.is_conj()
        if value.numel() and lies in self.names:
            return self.names[lies]
        name = place if place not in self.tensors else f"{place} ({len(self.tensors)})"
        plain = value.detach()
        self.tensors[name] = plain if value.dtype in NATIVE_DTYPES else as_bytes(apart(plain))
        self.names[lies] = name
        return name

    def wrapped(self, value: Any, place: str) -> dict[str, Any]:
        names, context = value.__tensor_flatten__()
        parts = {name: self.encoded(getattr(value, name), f"{place}.{name}") for name in names}
        kind = {"module": type(value).__module__, "class": type(value).__qualname__}
        shape = [list(value.shape), list(value.stride())]
        return {f"{MARK}wrapped": parts, **kind, "context": self.encoded(context, place), "shape": shape}

    def array(self, value: Any, place: str) -> dict[str, Any]:
        if value.dtype.kind not in ARRAY_KINDS:
            raise TypeError(f"`{place}` is a numpy array of {value.dtype}, which is not made of plain numbers or text.")
        name = place if place not in self.tensors else f"{place} ({len(self.tensors)})"
        self.tensors[name] = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {MARK + kind: name, "dtype": value.dtype.str, "shape": list(value.shape)}


def decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of `Writer.encoded`."""
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith(MARK):
        return {key: decoded(item, tensors) for key, item in value.items()}
    name, content = tag.removeprefix(MARK), value[tag]
    if name in MAPPINGS:
        return MAPPINGS[name]({decoded(key, tensors): decoded(item, tensors) for key, item in content})
    if name in SEQUENCES:
        return SEQUENCES[name](decoded(item, tensors) for item in content)
    if name == "tensor":
        return read_tensor(value, tensors[content])
    if name in ("array", "scalar"):
        return read_array(value, tensors[content])
    if name == "wrapped":
        return read_wrapped(value, tensors)
    return CODECS[name][2](content)


def read_wrapped(description: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """A tensor made of others. Raises: ValueError where its class is none of `WRAPPERS`."""
    module, name = description["module"], description["class"]
    kind: Any = getattr(import_module(module), name, None) if module.startswith(WRAPPERS) else None
    if not (isinstance(kind, type) and issubclass(kind, Tensor)):
        raise ValueError(f"The checkpoint asks for {module}.{name}, which is no kind of tensor that is known here.")
    parts = decoded(description[f"{MARK}wrapped"], tensors)
    context = decoded(description["context"], tensors)
    return kind.__tensor_unflatten__(parts, context, *description["shape"])  # type: ignore[attr-defined]


def read_tensor(description: dict[str, Any], stored: Tensor) -> Tensor:
    if "dtype" in description:
        stored = stored.view(getattr(torch, description["dtype"])).view(description["shape"])
    if "requires_grad" in description:
        return nn.Parameter(stored, requires_grad=description["requires_grad"])
    return stored


def read_array(description: dict[str, Any], stored: Tensor) -> Any:
    dtype, shape = np.dtype(description["dtype"]), description["shape"]
    count = int(np.prod(shape))
    array = np.frombuffer(stored.numpy().tobytes(), dtype=dtype, count=count).reshape(shape).copy()
    return array[()] if f"{MARK}scalar" in description else array


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor, [number of bytes] uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def name_of(kind: type, table: dict[str, Any]) -> str | None:
    return next((name for name, listed in table.items() if listed is kind), None)


CODECS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "float": (float, repr, float),
    "complex": (complex, lambda value: [repr(value.real), repr(value.imag)], lambda parts: complex(*map(float, parts))),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "dtype": (torch.dtype, lambda value: str(value).removeprefix("torch."), lambda name: getattr(torch, name)),
}
"""By name: the type, how it is written, and how it is read."""
