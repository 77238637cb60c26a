"""What decides a run's numbers beside its options: model, reference, rows, and what was given to the trainer."""

from __future__ import annotations

from enum import Enum
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from prefopt.data.cache import processing_fingerprints
from prefopt.data.content import hashes_of_rows, hashes_of_set
from prefopt.reference.adapters import adapter_modules, adapter_parameters, is_peft
from prefopt.reference.fingerprints import (
    IRRELEVANT,
    IRRELEVANT_OF_ADAPTER,
    base_name,
    used_tensors,
    weights_fingerprint,
)
from prefopt.reference.policy import SeparateModel
from prefopt.scoring.forward import innermost
from prefopt.trainer.callbacks import updates_reference

__all__ = ["flat", "row_hashes", "run_facts"]

LOOKED_AT = 8
"""Rows of a stream whose content is compared."""
OF_TOKENS = ("_ids", "_mask", "_prompt_start")
SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
"""Of a model's config: training aligns them with the tokenizer's, and no log-prob depends on them."""


def run_facts(trainer: Any) -> dict[str, Any]:
    """Facts as nested dicts of JSON's values; what cannot be known on this rank is not among them.

    Weights are known by a fingerprint of their bytes: those of the policy that are not trained (adapters apart, which
    a checkpoint holds), and those of a reference that is a model of its own and does not move. They are read once, at
    the speed of memory. What is trained or moves, and a reference made of adapters, comes from the checkpoint.
    """
    optimizer, scheduler = trainer.given_optimizers
    return {
        "method": trainer.method,
        "precision": str(trainer.accelerator.mixed_precision),
        "batch": batch_facts(trainer),
        "model": model_facts(trainer.model),
        "reference": reference_facts(trainer),
        "processing": processing_fingerprints(trainer.processing_class),
        "data": data_facts(trainer.train_dataset),
        "optimizer": optimizer_facts(optimizer),
        "scheduler": "of the options" if scheduler is None else kind(scheduler),
        "data_collator": "none" if trainer.collate_given is None else kind(trainer.collate_given),
    }


def batch_facts(trainer: Any) -> dict[str, Any]:
    """Pairs of a step, and of a block of rows of like length where rows are sorted by it."""
    args = trainer.args
    geometry = trainer.geometry(args.per_device_train_batch_size, args.gradient_accumulation_steps)
    by_length = args.train_sampling_strategy not in ("random", "sequential")
    return {"pairs per step (per device x accumulation x ranks)": geometry.pairs_per_step} | (
        {"pairs of like length": geometry.block_size} if by_length else {}
    )


def model_facts(model: Any) -> dict[str, Any]:
    """Architecture, which weights are trained, adapters, and the weights that are not trained."""
    inner = innermost(model)
    own = {id(parameter) for _, module in adapter_modules(model) for parameter in adapter_parameters(module)}
    trained = sorted(base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    frozen = weights_fingerprint(
        (name, tensor) for name, tensor in used_tensors(model) if not tensor.requires_grad and id(tensor) not in own
    )
    adapters = model.peft_config if is_peft(model) else {}
    return {
        "class": type(inner).__name__,
        "config": without(plain(inner.config.to_dict()), IRRELEVANT | SPECIAL_TOKENS),
        "dtype": str(inner.dtype),
        "trained weights": {"number": len(trained), "names": xxh3_64_hexdigest("\n".join(trained).encode())},
        **known("weights that are not trained", frozen),
        "adapters": {
            "names": ", ".join(sorted(adapters)) or "none",
            **{name: adapter_facts(config) for name, config in adapters.items()},
        },
    }


def without(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A config without entries of these names, those of its parts neither."""
    return {
        name: without(value, names) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in names
    }


def adapter_facts(config: Any) -> dict[str, Any]:
    """An adapter's config without what says where it is from."""
    dropout = {"lora_dropout"}
    return {k: v for k, v in plain(config.to_dict()).items() if k not in IRRELEVANT_OF_ADAPTER - dropout}


def reference_facts(trainer: Any) -> dict[str, Any]:
    """What the policy is compared with."""
    own = trainer.model_reference
    moves = updates_reference(trainer.args, trainer.callback_handler.callbacks)
    facts: dict[str, Any] = {"kind": "none" if own is None else kind(own)}
    if isinstance(own, SeparateModel) and not moves:
        facts |= known("weights", weights_fingerprint(used_tensors(own.model)))
    return facts | {"moves": moves}


def data_facts(rows: Any) -> dict[str, Any]:
    """What `row_hashes` do not say."""
    names = [name for name in sorted(rows.column_names or ()) if name != "row" and not name.endswith(OF_TOKENS)]
    columns = {"columns beside the tokens": ", ".join(names) or "none"} if rows.column_names else {}
    if isinstance(rows, datasets.Dataset):
        return {"kind": "set", **columns}
    return {"kind": "stream", **columns, "shards": rows.num_shards}


def row_hashes(rows: Any) -> NDArray[np.uint64]:
    """[n] of every prepared row of a set, [up to 8] of the first rows of a stream."""
    if isinstance(rows, datasets.Dataset):
        return hashes_of_set(rows)
    rows.set_epoch(0)  # an earlier run may have left it at another
    return np.array(hashes_of_rows(islice(rows, LOOKED_AT)), dtype=np.uint64)


def optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """An optimizer that the user gave: its kind, and the settings of its groups."""
    if optimizer is None:
        return {"kind": "of the options"}
    groups = [
        {
            name: plain(group.get(f"initial_{name}", value))  # what it was before a schedule
            for name, value in group.items()
            if name != "params" and not name.startswith("initial_")
        }
        | {"weights": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"kind": kind(optimizer), "groups": {str(number): group for number, group in enumerate(groups)}}


def flat(facts: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested facts as place -> value; an empty dict is a value."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        place = f"{above}{name}"
        found |= flat(value, f"{place}: ") if isinstance(value, dict) and value else {place: value}
    return found


def known(name: str, value: str | None) -> dict[str, str]:
    return {} if value is None else {name: value}


def kind(thing: Any) -> str:
    """The name of a function, or of the class of anything else."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def plain(value: Any) -> Any:
    """``value`` as JSON has it: tensors as numbers, sets in order, anything else as text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Enum):
        return plain(value.value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
