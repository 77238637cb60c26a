"""What a model card says of a run: what the run has written down of itself, and what its trainer holds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prefopt.checkpoints.publish import staged_model
from prefopt.reference.adapters import is_peft
from prefopt.scoring.forward import innermost
from prefopt.trainer.ending.record import CURVES

__all__ = ["DataSet", "data_sets", "has_curves", "how_it_went", "named_rows", "recorded", "settings_of", "shown"]

SETTINGS = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type"),
    *("cpo_alpha", "simpo_gamma", "alpha", "tpo_alpha", "tpo_l_gamma", "sync_ref_model", "ref_model_mixup_alpha"),
    *("ref_model_sync_steps", "max_length", "truncation_mode", "layout", "learning_rate", "lr_scheduler_type"),
    *("optim", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_steps", "weight_decay", "tokens_per_batch", "seed", "bf16", "fp16"),
)
"""The options of a config that a reader of the card wants to know."""
OF_A_MOVING_REFERENCE = ("ref_model_mixup_alpha", "ref_model_sync_steps")
UNNAMED = "unnamed rows"
"""A data set without a name of its own."""
OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "target_modules")
STATUS = {
    "running": "in training",
    "paused": "paused",
    "finished": "finished",
    "interrupted": "stopped before its end",
    "failed": "failed before its end",
}
"""How ``run.json`` calls the state of a run -> how the card does."""


@dataclass(frozen=True)
class DataSet:
    """A data set as the card shows it: its name, what it was used for, and what became of its rows."""

    name: str
    use: str = "training"
    rows: str = ""


def recorded(trainer: Any) -> Mapping[str, Any]:
    """What the run's ``run.json`` has; nothing where no run has begun."""
    record = getattr(trainer, "record", None)
    return {} if record is None else record.values


def settings_of(trainer: Any) -> dict[str, Any]:
    """The options that a reader wants to know, the adapter's among them, without those that are off."""
    args, model = trainer.args, trainer.model
    off = OF_A_MOVING_REFERENCE if not getattr(args, "sync_ref_model", False) else ()
    options = {name: getattr(args, name, None) for name in SETTINGS if name not in off}
    options |= {
        "layout": trainer.layout.layout,
        "dtype": str(innermost(model).dtype).removeprefix("torch."),
        "processes": getattr(args, "world_size", 1),
    }
    if is_peft(model):
        adapter = model.peft_config[model.active_adapters[0]]
        options["adapter"] = str(adapter.peft_type.value)
        values = {name: getattr(adapter, name, None) for name in OF_ADAPTERS}
        options |= {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return {name: value for name, value in options.items() if value is not None and value is not False}


def how_it_went(trainer: Any, record: Mapping[str, Any]) -> dict[str, str]:
    """How far the run has come, when and on what; nothing where none has begun."""
    if not record:
        return {}
    state, device = trainer.state, (record.get("machine") or {}).get("device")
    reason = (record.get("reason") or {}).get("type")
    status = STATUS[record["status"]] + (f" ({reason})" if reason else "")
    found = {
        "status": status,
        "steps": f"{state.global_step:,} of {state.max_steps:,}",
        "epochs": f"{state.epoch or 0:.2f}",
        "started": record["started"],
        "ended": record["ended"],
        "device": device,
    }
    return {what: str(value) for what, value in found.items() if value}


def has_curves(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the curves beside a card in a folder will be those of this run, which draws them when it ends.

    Args:
        folder: where the card is written, which may be what `staged_model` gives.
        record: of the run.
    """
    place = folder.parent if folder == staged_model(folder.parent) else folder
    if not record.get("ended") or not (place / CURVES).is_file():
        return False
    return (place / CURVES).stat().st_mtime >= datetime.fromisoformat(record["started"]).timestamp()


def data_sets(trainer: Any, record: Mapping[str, Any], name: str | None = None) -> list[DataSet]:
    """The sets of training and evaluation, with what became of their rows as far as that is known.

    Args:
        trainer: whose sets they are.
        record: of its run.
        name: of the training set, where that does not know its own.
    """
    known = record.get("data") or {}
    evaluated = getattr(trainer, "eval_dataset", None)
    if not isinstance(evaluated, Mapping):
        evaluated = {"": evaluated}
    sets = [("train", "training", trainer.train_dataset)]
    for own, rows in evaluated.items():
        sets.append(("eval_" + own if own else "eval", f"evaluation, {own}" if own else "evaluation", rows))
    found = []
    for key, use, rows in sets:
        if (named := named_rows(rows)) is not None:
            shown_name = name if name and use == "training" and named[0] == UNNAMED else named[0]
            found.append(DataSet(shown_name, use, row_counts(known.get(key) or {}, named[1])))
    return found


def row_counts(known: Mapping[str, Any], num_rows: int | None) -> str:
    """``8 of 10, 2 skipped, 1 cut``, of what is known."""
    kept, given = known.get("kept") or num_rows, known.get("rows")
    if kept is None:
        return ""
    parts = [f"{kept:,}" if given in (None, kept) else f"{kept:,} of {given:,}"]
    num_skipped = sum(reason["num"] for reason in (known.get("skipped") or {}).values())
    parts += [f"{num:,} {what}" for num, what in ((num_skipped, "skipped"), (known.get("truncated"), "cut")) if num]
    return ", ".join(parts)


def named_rows(dataset: Any) -> tuple[str, int | None] | None:
    """Name and number of rows of a data set, as far as it knows them; several names where it is made of several sets.

    What the package has loaded has the name that it was asked for by. What ``datasets.load_dataset`` has loaded has a
    name without its owner, who is a part of the path of its cache; and one of files is called by their format.
    """
    if dataset is None:
        return None
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    if name is None or name == getattr(info, "builder_name", None):
        name = UNNAMED
    for file in getattr(dataset, "cache_files", None) or ():
        owner = re.search(r"[\\/]([\w.-]+)___" + re.escape(name) + r"[\\/]", str(file["filename"]))
        name = f"{owner[1]}/{name}" if owner else name
    return ", ".join(map(shown, name.split(", "))), len(dataset) if hasattr(dataset, "__len__") else None


def shown(name: str) -> str:
    """A path by its last part: where it lies is nobody else's business."""
    if name.startswith(("/", "~", ".", "file:")) or re.match(r"[A-Za-z]:\\", name) or os.path.exists(name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name
    return name
