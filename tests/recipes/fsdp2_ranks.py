"""The recipe ``fsdp2`` on gloo ranks, in the environment that ``accelerate launch`` gives to each of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["accelerate_environment", "run", "worlds"]

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))


def worlds() -> Any:
    import worlds

    return worlds


def accelerate_environment(command: Sequence[str]) -> dict[str, str]:
    """What ``accelerate launch`` says of FSDP to its processes, of the command line of a `LaunchPlan`."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(list(command[3:]))
    settings = read_accelerate_config(args.config_file)
    for name, value in settings["fsdp_config"].items():
        setattr(args, name, value)
    args.use_fsdp = settings["distributed_type"] == "FSDP"
    args.mixed_precision, args.num_processes, args.num_machines = settings["mixed_precision"], 2, 1
    args.dynamo_backend, args.dynamo_mode = "no", "default"  # accelerate's own defaults, filled in when it launches
    said = prepare_multi_gpu_env(args)
    return {name: value for name, value in said.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def read_accelerate_config(path: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(Path(path).read_text())


def run(arguments: list[str], folder: Path) -> None:
    """Of every rank: train; the first says under which kind of distribution."""
    from sharded import shard_on_cpu

    from prefopt.cli.main import main
    from prefopt.recipes.catalogue import FOLDER

    shard_on_cpu()
    assert main(["train", str(FOLDER / "fsdp2.yaml"), *arguments]) == 0
    from accelerate.state import AcceleratorState

    if os.environ["RANK"] == "0":
        (folder / "kind.json").write_text(json.dumps(AcceleratorState().distributed_type.value))
