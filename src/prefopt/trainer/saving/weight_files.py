"""The weights of a model in a checkpoint: safetensors, never pickle, and under the names that the model has now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

__all__ = ["load_weights", "read_weights", "weight_files"]

PICKLED = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
"""Names of weights that are pickles."""


def weight_files(folder: str | Path, single: str = SAFE_WEIGHTS_NAME) -> list[Path]:
    """The safetensors files with the weights of a model or an adapter.

    Args:
        folder: a checkpoint, or a saved model.
        single: the file's name where there is one.

    Raises:
        ValueError: there are none; names pickles that are there instead.
    """
    if (path := Path(folder, single)).is_file():
        return [path]
    if (path := Path(folder, SAFE_WEIGHTS_INDEX_NAME)).is_file():
        names = set(json.loads(path.read_text())["weight_map"].values())
        return [Path(folder, Path(name).name) for name in sorted(names)]
    pickled = sorted({path.name for pattern in PICKLED for path in Path(folder).glob(pattern)})
    raise ValueError(
        f"{folder} has no {single}. "
        + (
            f"It has {', '.join(pickled)}: pickle may run any code when it is read, so it is never read. Where you "
            "trust whoever made it, turn it into safetensors yourself (`from_pretrained`, then `save_pretrained`), and "
            "start a new run from that folder."
            if pickled
            else "Resume from another checkpoint, or start a new run."
        )
    )


def load_weights(model: Any, folder: str | Path) -> None:
    """Give a model the weights of a checkpoint, bit for bit.

    Args:
        model: whole on this rank.
        folder: where it was saved with ``save_pretrained``.

    Raises:
        ValueError: the weights are pickled, or are those of another model.
    """
    model.load_state_dict(read_weights(model, folder), strict=False)


def read_weights(model: Any, folder: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint on the CPU, under the names of ``model.state_dict()``; tied ones once or more.

    Raises:
        ValueError: the weights are pickled, or are those of another model.
    """
    saved = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
    if not saved.keys() <= model.state_dict().keys():
        # Transformers keeps some models, those with experts above all, under other names and in other pieces on the
        # disk. Its loader puts them together; float32 holds every type that the copy into the model may have.
        del saved
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):  # else other ranks than the first get zeros
            made = type(model).from_pretrained(
                folder, config=model.config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        saved = dict(made.state_dict())
    refuse_others(model, saved, folder)
    return saved


def refuse_others(model: Any, saved: dict[str, Tensor], folder: str | Path) -> None:
    """Raises: ValueError where the names are not those of the model; a weight that is tied needs one of its names."""
    own = model.state_dict().keys()
    same = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    there = {same.get(name) for name in saved} - {None}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [name for name in own if name not in saved and name not in left_out and same.get(name) not in there]
    unknown = [name for name in saved if name not in own]
    if missing or unknown:
        raise ValueError(
            f"The weights in {folder} are not those of this model. Missing: {some(missing)}. Not known to the model: "
            f"{some(unknown)}. Resume with the model that the run was started with."
        )


def some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"
