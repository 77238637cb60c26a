"""Runs to check: their rows, their file, and what a check finds of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from prefopt.cli.check import everything, places
from prefopt.cli.run_file import method_and_arguments, read_run_file, without_config
from prefopt.inspection.checking.check import Checked
from prefopt.inspection.checking.need import Need
from prefopt.inspection.checking.problems import Problem
from prefopt.quickstart import ASSETS, preference_set


def write(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(count: int = 24) -> list[dict[str, Any]]:
    return [dict(row) for row in preference_set("train", count)]


def run_file(**values: Any) -> str:
    usual = {
        "model_name_or_path": str(ASSETS),
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    Path("run.yaml").write_text(yaml.safe_dump({**usual, **values}, sort_keys=False))
    return "run.yaml"


def check(*flags: str, **values: Any) -> tuple[Checked, Need | None]:
    """What a check finds, before it is printed."""
    method, arguments = method_and_arguments("check", [run_file(**values), *flags])
    left, path = without_config(arguments)
    return everything(method, arguments, places(read_run_file(str(path)), left), Console())


def problems(checked: Checked, level: str = "error") -> list[Problem]:
    return [problem for problem in checked.findings.problems if problem.level == level]
