"""Adapters by the name of their folder or repository, and in checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from prefopt.checkpoints.tensors import write_tensors
from prefopt.reference.adapters import is_peft
from prefopt.reference.weights import named_weights
from prefopt.trainer.adapters import ready_for_adapter
from prefopt.trainer.saving.weight_files import weight_files

__all__ = ["base_of_adapter", "load_adapter_weights", "save_encoders", "with_saved_adapter"]

ENCODERS_FILE = "prompt_encoders.safetensors"
"""In a checkpoint: what makes the virtual tokens, of which PEFT saves the result alone."""


def base_of_adapter(name: str | os.PathLike[str], **hub: Any) -> tuple[str, str | None] | None:
    """Name and revision of the model that an adapter's folder or repository belongs to; None for whole models.

    Args:
        name: path or hub id.
        hub: ``revision``, ``token``, ``cache_dir``.

    Raises:
        ValueError: if the adapter does not say what it belongs to.
    """
    if not is_peft_available() or Path(name, "config.json").is_file():
        return None
    path = find_adapter_config_file(os.fspath(name), **hub)
    if path is None:
        return None
    config = json.loads(Path(path).read_text())
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{os.fspath(name)!r} is an adapter that does not name its base model: it was made on a model without a "
            "path. Load the base model yourself and give `PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )
    return base, config.get("revision")


def with_saved_adapter(base: Any, name: str | os.PathLike[str], **hub: Any) -> Any:
    """The base model with the adapter of a folder or repository, which is trained further."""
    from peft import PeftModel

    return PeftModel.from_pretrained(ready_for_adapter(base), os.fspath(name), is_trainable=True, **hub)


def load_adapter_weights(model: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Read every adapter of ``model`` back from a checkpoint; which are active and which are trained stays as it is.

    Args:
        model: a PeftModel, whole on this rank.
        checkpoint: a folder with the adapter called ``default``, and a folder in it for each other one.

    Raises:
        ValueError: if an adapter is not there, or is pickled.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    if encoders := encoder_weights(model):
        for name, tensor in load_file(there(Path(checkpoint, ENCODERS_FILE), "what makes the virtual tokens")).items():
            encoders[name].data.copy_(tensor)
        return
    for name in model.peft_config:
        folder = Path(checkpoint) if name == "default" else Path(checkpoint, name)
        there(folder / "adapter_config.json", f"the adapter {name!r}")
        weight_files(folder, ADAPTER_SAFE_WEIGHTS_NAME)
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


def there(file: Path, what: str) -> Path:
    """``file``. Raises: ValueError where it is missing."""
    if not file.is_file():
        raise ValueError(
            f"The checkpoint has no {file}, in which {what} should be. Resume from a checkpoint of this run, with the "
            "model and the `peft_config` that it was started with."
        )
    return file


def save_encoders(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what makes the virtual tokens, where there is such a thing."""
    if weights := encoder_weights(model):
        write_tensors(dict(weights), Path(folder, ENCODERS_FILE))


def encoder_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that virtual tokens are computed from (p-tuning); none where they are weights themselves."""
    if not (is_peft(model) and hasattr(model, "prompt_encoder")):
        return {}
    weights = {name: weight for name, weight in named_weights(model).items() if name.startswith("prompt_encoder.")}
    return weights if any(not name.endswith(".embedding.weight") for name in weights) else {}
