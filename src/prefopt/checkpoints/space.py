"""Room on the disk: what a checkpoint will take, and what there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

__all__ = ["checkpoint_bytes", "folder_bytes", "free_bytes", "in_words", "tensor_bytes"]

VALUES_PER_WEIGHT = {"adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "adam": 2}
"""Values of a weight's own shape that an optimizer of such a name keeps; of others none is certain."""
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def checkpoint_bytes(model: nn.Module, optimizer: str | None, beside: Iterable[Tensor], *, adapter: bool) -> int:
    """What a checkpoint takes at least, to refuse no run that has the room.

    Args:
        model: not yet wrapped.
        optimizer: the name of its kind, as `adamw_torch` or `AdamW`; None where only the model is saved.
        beside: other tensors of the checkpoint: a reference that moves, averages.
        adapter: of the model only what is trained is saved.

    Returns:
        Bytes; weights as they are stored, the optimizer's values in their type, or in 8 or 4 bits.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    saved = tensor_bytes(trained if adapter else parameters) + tensor_bytes(beside)
    if optimizer is None:
        return saved
    name = optimizer.lower()
    values = next((count for part, count in VALUES_PER_WEIGHT.items() if part in name), 0)
    bits = next((bits for bits in (4, 8) if f"{bits}bit" in name), None)
    count = sum(parameter.numel() for parameter in trained)
    return saved + values * (tensor_bytes(trained) if bits is None else count * bits // 8)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, of which several may be divided among ranks: as a whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to a folder, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def in_words(count: int) -> str:
    """Bytes with a unit that fits."""
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size), (1, "bytes"))
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count} bytes"
