"""Help is quick and short for every command: nothing heavy is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from prefopt.cli.usage import COMMANDS

HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "optuna", "peft", "ray"}
"""Packages that take a tenth of a second and more to import."""
MAX_LINES, MAX_WIDTH = 60, 120


def in_new_process(statement: str) -> tuple[str, set[str]]:
    """What a statement prints, and the heavy packages that it has imported."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_of_every_command(command: str) -> None:
    """argparse ends the process after its help; 0 either way."""
    arguments = [*([command] if command else []), "--help"]
    statement = (
        "from prefopt.cli.main import main\n"
        f"try:\n    status = main({arguments!r})\nexcept SystemExit as done:\n    status = done.code or 0\n"
        "assert status == 0, status"
    )
    printed, heavy = in_new_process(statement)
    assert heavy == set()
    lines = printed.splitlines()
    assert 2 <= len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_WIDTH
    assert f"prefopt {command}".rstrip() in printed


@pytest.mark.parametrize("command", ["stats data.jsonl --bta 0.2", "dpo --bta 0.2"])
def test_an_unknown_option_is_said_before_anything_heavy_is_imported(command: str) -> None:
    statement = f"from prefopt.cli.main import main\nassert main({command.split()!r}) == 2"
    _, heavy = in_new_process(statement)
    assert heavy == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert in_new_process("import prefopt") == ("", set())
