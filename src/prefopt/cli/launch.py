"""Handing a run over to ``accelerate launch``; as a program, that launcher."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from prefopt.cli.run_file import nearest, read_yaml

__all__ = ["LAUNCHED", "LaunchPlan", "accelerate_config_path", "launch", "launcher", "leave", "plan_launch"]

LAUNCHED = "PREFOPT_LAUNCHED"
"""Environment variable of a process that was launched already."""
CONFIGS = Path(__file__).parent / "accelerate_configs"


@dataclass(frozen=True)
class LaunchPlan:
    """A command line and what its environment has in addition."""

    command: tuple[str, ...]
    env: Mapping[str, str]


def plan_launch(method: str, arguments: Sequence[str], rest: Sequence[str]) -> LaunchPlan | None:
    """How to launch a run, or None where this process is to run it.

    Args:
        method: ``dpo``, ``cpo`` or ``tpo``.
        arguments: The arguments of ``prefopt METHOD``.
        rest: Those that no config takes, in YAML or on the command line: ``--accelerate_config`` and flags of
            ``accelerate launch``.

    Raises:
        ValueError: A flag belongs to neither, or the accelerate config does not exist.
    """
    if os.environ.get(LAUNCHED):
        return None
    flags, config = _without_accelerate_config(rest)
    _check_flags(flags)
    if config is None and flags in ([], ["--num_processes", "1"]):
        return None
    path = accelerate_config_path(config) if config is not None else _default_config(flags)
    arguments, token = _without_token(arguments)
    env = {LAUNCHED: "1", **({"HF_TOKEN": token} if token else {})}
    if path is not None:
        settings, _ = read_yaml(path)
        flags = ["--config_file", str(path), *flags]
        if settings.get("use_cpu"):
            env["ACCELERATE_USE_CPU"] = "true"
        if "num_processes" not in settings and not _has(flags, "num_processes"):
            flags += ["--num_processes", str(max(1, _num_devices()))]
    command = (sys.executable, "-m", "prefopt.cli.launch", *flags, "-m", "prefopt.cli.main", method, *arguments)
    return LaunchPlan(command, env)


def launch(plan: LaunchPlan) -> NoReturn:
    """Replaces this process by the launcher."""
    sys.stdout.flush()
    os.execve(plan.command[0], list(plan.command), {**os.environ, **plan.env})


def launcher() -> int:
    """Runs ``accelerate launch`` with this program's arguments; returns its status, which is 128 + N after signal N."""
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        main()
    except SignalException as stopped:  # it has waited for the ranks, and would end with status 1 and a traceback
        return 128 + stopped.sigval
    return 0


def leave(status: int) -> NoReturn:
    """End this process; as one of several ranks, without the interpreter's own end.

    A thread of gloo that lets go of its last tensor while the interpreter of Python 3.11 is taken down ends the process
    with an abort, after a run in which all went well. What has to happen at the end happens here before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # ends idle pools of threads, and waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def accelerate_config_path(name: str) -> Path:
    """The file of one of the shipped configs, or a path of the user's.

    Raises:
        ValueError: It is neither.
    """
    shipped = CONFIGS / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = sorted(config.stem for config in CONFIGS.glob("*.yaml"))
        raise ValueError(
            f"accelerate_config={name!r}: is neither a file nor one of {', '.join(names)}{nearest(name, names)}"
        )
    return path


def _without_accelerate_config(rest: Sequence[str]) -> tuple[list[str], str | None]:
    flags: list[str] = []
    config, items = None, iter(rest)
    for item in items:
        name, equals, value = item.partition("=")
        if name not in ("--accelerate_config", "--accelerate-config"):
            flags.append(item)
            continue
        config = value if equals else next(items, "")
        if not config:
            raise ValueError("--accelerate_config wants the name of a shipped config or the path of a file")
    return flags, config


def _without_token(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without the Hub's token, and that: command lines are seen by all users and shown by launchers."""
    rest: list[str] = []
    token, items = None, iter(arguments)
    for item in items:
        name, equals, value = item.partition("=")
        if name in ("--hub_token", "--hub-token"):
            token = value if equals else next(items, None)
        else:
            rest.append(item)
    return rest, token


def _check_flags(flags: Sequence[str]) -> None:
    """Refuses what ``accelerate launch`` does not know."""
    if not flags:
        return
    from accelerate.commands.launch import launch_command_parser

    known = launch_command_parser()._option_string_actions
    wrong = [flag for flag in flags if flag.startswith("--") and flag.partition("=")[0] not in known]
    if not flags[0].startswith("-"):
        wrong.insert(0, flags[0])
    if wrong:
        raise ValueError("\n".join(f"unknown option {flag}{nearest(flag, known)}" for flag in wrong))


def _default_config(flags: Sequence[str]) -> Path | None:
    """For several processes without a word on how: the user's own default of accelerate, else one that fits."""
    from accelerate.commands.config.config_args import default_config_file

    if _has(flags, "config_file") or Path(default_config_file).is_file():
        return None
    return CONFIGS / ("multi_gpu.yaml" if _num_devices() else "cpu.yaml")


def _num_devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag.partition("=")[0].lstrip("-").replace("-", "_") == name for flag in flags)


if __name__ == "__main__":
    sys.exit(launcher())
