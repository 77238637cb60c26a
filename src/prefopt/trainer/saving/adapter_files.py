"""Adapters by the name of their folder or repository, and in checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from prefopt.checkpoints.tensors import has_state, read_state, write_state, write_tensors
from prefopt.reference.adapters import is_peft
from prefopt.reference.weights import named_weights
from prefopt.trainer.adapters import AllocateRanks, ready_for_adapter, without_their_warnings
from prefopt.trainer.saving.weight_files import some, weight_files

__all__ = ["base_of_adapter", "load_adapter_weights", "save_encoders", "save_ranks", "with_saved_adapter"]

ENCODERS_FILE = "prompt_encoders.safetensors"
"""In a checkpoint: what makes the virtual tokens, of which PEFT saves the result alone."""
RANKS = "adalora"
"""In a checkpoint: the state with all ranks of AdaLoRA, of which PEFT saves only those that are left."""
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's names for the averages by which the ranks are allocated."""


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

    with without_their_warnings():
        return PeftModel.from_pretrained(ready_for_adapter(base), os.fspath(name), is_trainable=True, **hub)


def load_adapter_weights(model: Any, checkpoint: str | Path) -> None:
    """Read every adapter of ``model`` back from a checkpoint; which are active and which are trained stays as it is.

    Args:
        model: a PeftModel, whole on this rank.
        checkpoint: a folder with the adapter called ``default``, and a folder in it for each other one.

    Raises:
        ValueError: if an adapter is not there, is pickled, or is on other modules or of other ranks.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    if encoders := encoder_weights(model):
        for name, tensor in load_file(there(Path(checkpoint, ENCODERS_FILE), "what makes the virtual tokens")).items():
            encoders[name].data.copy_(tensor)
        return
    ranks = read_state(checkpoint, RANKS) if has_state(checkpoint, RANKS) else None
    missing, unknown = trained_weights(model), set()
    for name, config in model.peft_config.items():
        folder = Path(checkpoint) if name == "default" else Path(checkpoint, name)
        there(folder / "adapter_config.json", f"the adapter {name!r}")
        weight_files(folder, ADAPTER_SAFE_WEIGHTS_NAME)
        saved = load_peft_weights(str(folder), device="cpu")
        if ranks is not None and name == ranks["adapter"]:
            config.rank_pattern = None  # PEFT would take the ranks out of the model that are masked in it
            saved = {key: tensor for key, tensor in saved.items() if not is_factor(key, name)}
        try:
            found = set_peft_model_state_dict(model, saved, adapter_name=name)
        except RuntimeError as error:  # what torch says of tensors of other shapes
            raise ValueError(
                f"The adapter {name!r} in {folder} has weights of other shapes than this run's: another `r`, or "
                "AdaLoRA without the ranks that it has given up. Give the folder as the model, and leave `peft_config` "
                f"and `resume_from_checkpoint` out. {error}"
            ) from error
        missing &= set(found.missing_keys)
        unknown |= set(found.unexpected_keys)
    if ranks is not None:
        load_ranks(model, ranks)
        missing -= ranks["factors"].keys()
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return  # PEFT reads virtual tokens by other names
    refuse_other_modules(missing, unknown, checkpoint)


def refuse_other_modules(missing: set[str], unknown: set[str], checkpoint: str | Path) -> None:
    """Raises: ValueError where trained weights are not in a checkpoint, or others are."""
    if missing or unknown:
        raise ValueError(
            f"The adapter in {checkpoint} is not on the modules of this run's. Missing: {some(sorted(missing))}. Not "
            f"known to the model: {some(sorted(unknown))}. Take the `peft_config` that it was made with, or give the "
            "folder as the model and leave `peft_config` and `resume_from_checkpoint` out."
        )


def trained_weights(model: nn.Module) -> set[str]:
    """Names of the weights that are trained; of a tied one all."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in named if weight.requires_grad}


def there(file: Path, what: str) -> Path:
    """``file``. Raises: ValueError where it is missing."""
    if not file.is_file():
        raise ValueError(
            f"The checkpoint has no {file}, in which {what} should be. Resume from a checkpoint of this run, with the "
            "model and the `peft_config` that it was started with."
        )
    return file


def save_encoders(model: nn.Module, folder: str | Path) -> None:
    """Write what makes the virtual tokens, where there is such a thing."""
    if weights := encoder_weights(model):
        write_tensors(dict(weights), Path(folder, ENCODERS_FILE))


def encoder_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that virtual tokens are computed from (p-tuning); none where they are weights themselves."""
    if not (is_peft(model) and hasattr(model, "prompt_encoder")):
        return {}
    weights = {name: weight for name, weight in named_weights(model).items() if name.startswith("prompt_encoder.")}
    return weights if any(not name.endswith(".embedding.weight") for name in weights) else {}


# -- AdaLoRA -----------------------------------------------------------------------------------------------------


def save_ranks(model: Any, state: dict[str, Tensor] | None, folder: str | Path) -> None:
    """Write all ranks of AdaLoRA, which are left and what the next allocation goes by; nothing of other adapters.

    Args:
        model: bare.
        state: its weights, where they are gathered already.
        folder: of a checkpoint.
    """
    if not AllocateRanks.is_needed(model):
        return
    name = model.base_model.trainable_adapter_name
    factors = {key: tensor for key, tensor in (state or model.state_dict()).items() if is_factor(key, name)}
    averages = {average: getattr(model.base_model.rankallocator, average) for average in AVERAGES}
    pattern = model.peft_config[name].rank_pattern
    write_state({"adapter": name, "pattern": pattern, "factors": factors, "averages": averages}, folder, RANKS)


def load_ranks(model: Any, saved: dict[str, Any]) -> None:
    """Give AdaLoRA what `save_ranks` wrote."""
    model.load_state_dict(saved["factors"], strict=False)
    model.peft_config[saved["adapter"]].rank_pattern = saved["pattern"]
    device = next(model.parameters()).device
    allocator = model.base_model.rankallocator
    for average, of_weights in saved["averages"].items():
        setattr(allocator, average, {key: tensor.to(device) for key, tensor in of_weights.items()})
    allocator.ipt = dict(allocator.exp_avg_ipt)  # by whose names PEFT sees that averages are there; computed anew


def is_factor(key: str, adapter: str) -> bool:
    """Whether an entry of a state, of a model or of a saved adapter, is one of the three factors of AdaLoRA."""
    return key.removesuffix(f".{adapter}").endswith((".lora_A", ".lora_B", ".lora_E"))
