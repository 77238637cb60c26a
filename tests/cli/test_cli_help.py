"""Help is quick and short for every command: nothing heavy is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.cli.main import main
from prefopt.cli.usage import ALONE, COMMANDS, METHODS

HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "optuna", "peft", "ray"}
"""Packages that take a tenth of a second and more to import."""
MAX_LINES, MAX_WIDTH = 60, 80
WIDE = {"sweep": 120}


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
    assert max(map(len, lines)) <= WIDE.get(command, MAX_WIDTH)
    assert f"prefopt {command}".rstrip() in printed


@pytest.mark.parametrize(
    "command",
    [
        "stats data.jsonl --bta 0.2",
        "dpo --bta 0.2",
        "dpo --beta 0.2",  # names no model and no data
        "env --model",
        "env one two",
        "check run.yaml",
        "check run.yaml --bta 0.2",
        "train run.yaml",
    ],
)
def test_an_unknown_option_is_said_before_anything_heavy_is_imported(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("bta: 0.1\n")
    statement = f"from prefopt.cli.main import main\nassert main({command.split()!r}) == 2"
    _, heavy = in_new_process(statement)
    assert heavy == set()


def status_of(*arguments: str) -> int:
    """Of the command; argparse ends the process after its help."""
    try:
        return main(arguments)
    except SystemExit as done:
        return int(done.code or 0)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - METHODS))
def test_help_all_of_other_commands_is_their_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for flag in ("--help", "--help-all"):
        assert status_of(command, flag) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    if command in ("train", "check", "show", "stats"):  # which take the options of a run
        assert "prefopt METHOD --help-all" in " ".join(printed[0].split())


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - ALONE))
def test_a_command_without_what_it_needs_shows_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(command) == 0
    assert capsys.readouterr().out.startswith(f"usage: prefopt {command} ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("report run --htm page.html", "unknown option --htm; did you mean 'html'?; see prefopt report --help"),
        ("compare a b --dataset-nam c", "unknown option --dataset_nam; did you mean 'dataset_name'?"),
        ("compare a", "the following arguments are required: TUNED, --dataset_name; see prefopt compare --help"),
        ("merge run --outputdir d", "unknown option --outputdir; did you mean 'output_dir'?"),
        ("merge run other --output-dir d", "unexpected argument 'other'; see prefopt merge --help"),
        ("quickstart --sed 1", "unknown option --sed; did you mean 'seed'?; see prefopt quickstart --help"),
        ("stats data.jsonl --jso f", "unknown option --jso; did you mean 'json'?"),
        ("show run.yaml --rowz 3", "unknown option --rowz; did you mean 'rows'?"),
        ("recipes cp dpo --forse", "unknown option --forse; did you mean 'force'?"),
        ("sweep clone d t --from-scrach", "unknown option --from_scrach; did you mean 'from_scratch'?"),
        ("env --model", "unexpected argument '--model'"),
        ("dpo --beta 1", "model_name_or_path: name the model to train"),
    ],
)
def test_a_wrong_command_line_is_one_message(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("beta: 0.1\n")
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"prefopt: {said}")
    assert printed.out == ""


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert in_new_process("import prefopt") == ("", set())
