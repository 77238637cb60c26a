"""``prefopt sweep ls | stop | resume | clone``: commands to a sweep, which may be running in another terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import users_mistakes
from prefopt.cli.own_parser import OwnParser
from prefopt.terminal import harmless

if TYPE_CHECKING:
    from prefopt.sweep.state import Sweep

__all__ = ["COMMANDS", "command"]

COMMANDS = ("ls", "stop", "resume", "clone")
ANSWER_SECONDS = 120.0
"""How long a command waits: the trial that it is about may be within an evaluation or a long step."""

LONGEST_REASON = 160
"""Characters of why a trial has ended."""


def command(arguments: Sequence[str]) -> int:
    """Show a sweep, or ask the process that runs it; where none does, do it here. Returns the exit status."""
    options = parsed_command(arguments)
    from prefopt.sweep.state import read_sweep

    with users_mistakes():
        sweep = read_sweep(options.folder)
        if sweep is None:
            raise ValueError(f"{options.folder} is no folder of a sweep: it has no sweep.json")
        if options.command == "ls":
            show(options.folder, sweep)
            return 0
        return asked(options, sweep)


def show(folder: Path, sweep: Sweep) -> None:
    """How a sweep stands, why trials have ended, and whether anybody runs it."""
    from prefopt.sweep.state import OVER, FolderInUseError, held
    from prefopt.sweep.table import print_table

    is_over = all(trial.status in OVER for trial in sweep.trials)

    print_table(folder, sweep)
    for trial in sweep.trials:
        if trial.reason:
            print(harmless(f"{trial.name} {trial.status}: {' '.join(trial.reason.split())[:LONGEST_REASON]}"))
    try:
        with held(folder):
            to_go_on = "" if is_over else f"; to go on: prefopt sweep {sweep.source}"
            print(harmless(f"Nobody runs this sweep now{to_go_on}"))
    except FolderInUseError:
        print("This sweep is running.")
    except PermissionError:  # another's folder, which one may look at all the same
        pass


def parsed_command(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OwnParser(prog="prefopt sweep")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        one = commands.add_parser(name)
        one.add_argument("folder", metavar="DIR", type=Path)
        if name != "ls":
            one.add_argument("trial", metavar="TRIAL")
        if name == "clone":
            one.add_argument("--set", nargs="+", default=[], action="extend", metavar="OPTION=VALUE")
            one.add_argument("--from_scratch", action="store_true")
    return parser.parse_args(list(arguments))


def asked(options: argparse.Namespace, sweep: Sweep) -> int:
    from prefopt.sweep.commands import Request, apply, ask, wait_for_answer
    from prefopt.sweep.state import FolderInUseError, held, read_sweep, write_sweep

    request = Request(options.command, options.trial, changes(options), getattr(options, "from_scratch", False))
    folder = options.folder
    try:
        with held(folder):
            from prefopt.cli.sweep_file import read_sweep_file

            file = read_sweep_file(sweep.source, str(folder))
            after, text = apply(folder, read_sweep(folder) or sweep, request, file.check)
            write_sweep(folder, after)
            print(harmless(f"{text}\nNobody runs this sweep now; to go on: prefopt sweep {sweep.source}"))
            return 0
    except FolderInUseError:
        found = wait_for_answer(folder, ask(folder, request), ANSWER_SECONDS)
    if found is None:
        raise ValueError(f"no answer within {ANSWER_SECONDS:.0f} s; the request stays, and is done when a step ends")
    text, is_done = found
    if not is_done:
        raise ValueError(text)
    print(harmless(text))
    return 0


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """``--set option=value`` as YAML reads the values.

    Raises:
        ValueError: one has no ``=``, or its value is no YAML.
    """
    import yaml

    found = {}
    for text in getattr(options, "set", []):
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: wants option=value")
        try:
            found[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {text}: the value is no YAML") from None
    if options.command == "clone" and not found and not options.from_scratch:
        raise ValueError("clone: say what changes: --set option=value; or --from_scratch")
    return found
