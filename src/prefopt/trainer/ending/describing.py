"""What is known of a run beside its rows, for ``run.json``: options, model, data, machine, and where its time went."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from prefopt.data import prepare_report
from prefopt.reference.adapters import is_peft
from prefopt.scoring.forward import innermost
from prefopt.trainer.card_facts import named_rows, shown
from prefopt.trainer.saving.continuation import arguments
from prefopt.trainer.saving.facts import kind

__all__ = ["Clock", "described", "peak_memory"]

NUM_ROWS_NAMED = 50
"""Skipped rows that are named for each reason."""
NUM_FILES_NAMED = 5


class Clock:
    """Seconds of a run by what they went into; each second counts once, for the innermost part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.within = 0.0
        """Seconds of parts within the one that runs."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start, around, self.within = time.perf_counter(), self.within, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.within
            self.within = around + spent


def described(trainer: Any) -> dict[str, Any]:
    """Options (all, and the names of those that were set), losses, model, data sets and machine of a run.

    Args:
        trainer: a `PreferenceTrainer`, about to train.
    """
    args = trainer.args
    return {
        "options": arguments(args),
        "options_set": sorted(name for name in args.__dataclass_fields__ if args.was_set(name)),
        "losses": list(trainer.preference.names),
        "model": model_described(trainer),
        "data": {name: set_described(rows) for name, rows in sets_of(trainer).items()},
        "machine": machine_described(trainer),
    }


def model_described(trainer: Any) -> dict[str, Any]:
    """What is trained, on what, and beside what."""
    model, reference = trainer.model, trainer.model_reference
    inner = innermost(model)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    adapters = sorted({str(config.peft_type.value) for config in model.peft_config.values()}) if is_peft(model) else []
    return {
        "name": shown(str(inner.config._name_or_path or "")) or None,
        "class": type(inner).__name__,
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "adapters": adapters,
        "reference": None if reference is None else kind(reference).rpartition(".")[2],
        "layout": trainer.layout.layout,
    }


def sets_of(trainer: Any) -> dict[str, Any]:
    """The training set and every evaluation set, by the names that their metrics have."""
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        others = {f"eval_{name}": rows for name, rows in evaluated.items()}
    else:
        others = {} if evaluated is None else {"eval": evaluated}
    return {"train": trainer.train_dataset, **others}


def set_described(rows: Any) -> dict[str, Any]:
    """Where a set is from, and what became of its rows; of a stream, as far as it was read.

    ``rows``, ``truncated``, ``merged`` and ``skipped`` (reason -> ``num`` and the first row numbers) are missing for a
    set that came prepared.
    """
    name, num_kept = named_rows(rows) or (None, None)
    files = list(getattr(getattr(rows, "info", None), "download_checksums", None) or {})[:NUM_FILES_NAMED]
    found: dict[str, Any] = {"name": name, "files": [shown(str(file)) for file in files], "kept": num_kept}
    try:
        report = prepare_report(rows)
    except ValueError:
        return found
    return found | {
        "rows": report.num_rows,
        "kept": report.num_kept,
        "truncated": report.num_truncated,
        "merged": report.num_merged,
        "skipped": {
            reason: {"num": len(numbers), "rows": numbers[:NUM_ROWS_NAMED]}
            for reason, numbers in report.skipped.items()
        },
    }


def machine_described(trainer: Any) -> dict[str, Any]:
    """What the run is made on."""
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": trainer.args.world_size,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most: of torch's tensors on the device, and of the whole process in the host's memory."""
    found = {}
    if device.type != "cpu" and torch.accelerator.is_available():
        found["device"] = torch.accelerator.max_memory_allocated()
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss is counted in
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found
