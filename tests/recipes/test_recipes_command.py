"""``prefopt recipes``: what there is, copies that are never in the way of a file, and messages that help."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt.cli.main import main
from prefopt.recipes.catalogue import recipe, recipe_names


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [["ls"], []])
def test_all_are_listed_each_with_command_purpose_and_papers(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", *arguments]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert re.findall(r"^([a-z\d-]+)  +(dpo|cpo|tpo)  ", printed, flags=re.MULTILINE) == [
        (name, recipe(name).method) for name in recipe_names()
    ]
    one_line = " ".join(printed.split())
    for name in recipe_names():
        assert all(paper in one_line for paper in recipe(name).papers)
        assert recipe(name).purpose.split()[0] in one_line


def test_a_copy_is_the_recipe_and_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "simpo"]) == 0
    assert Path("simpo.yaml").read_text() == recipe("simpo").text
    printed = capsys.readouterr().out
    assert "prefopt check simpo.yaml" in printed
    assert "prefopt train simpo.yaml" in printed


def test_a_copy_under_another_name_has_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "tpo_l", "my runs.yaml"]) == 0
    copy = Path("my runs.yaml").read_text()
    assert copy.splitlines()[1] == "# prefopt train 'my runs.yaml'"
    assert yaml.safe_load(copy) == recipe("tpo-l").options
    (command,) = re.findall(r"prefopt train (.*)", capsys.readouterr().out)
    assert shlex.split(command) == ["my runs.yaml"]
    Path("folder").mkdir()
    assert main(["recipes", "cp", "dpo.yaml", "folder"]) == 0
    assert Path("folder/dpo.yaml").is_file()


def test_a_name_cannot_write_options_into_the_copy() -> None:
    assert main(["recipes", "cp", "dpo", "a\nbeta: 9\n.yaml"]) == 0
    assert yaml.safe_load(Path("a\nbeta: 9\n.yaml").read_text()) == recipe("dpo").options


def test_a_file_that_is_there_stays(capsys: pytest.CaptureFixture[str]) -> None:
    Path("dpo.yaml").write_text("mine")
    assert main(["recipes", "cp", "dpo"]) == 2
    assert Path("dpo.yaml").read_text() == "mine"
    assert "dpo.yaml is there already" in capsys.readouterr().err
    assert main(["recipes", "cp", "dpo", "--force"]) == 0
    assert Path("dpo.yaml").read_text() == recipe("dpo").text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cp", "simp"], "there is no recipe 'simp'; did you mean 'simpo'?"),
        (["show", "\x1b[31mkto"], r"there is no recipe '\x1b[31mkto'"),
        (["cp", "dpo", "no/such/dpo.yaml"], "there is no folder no/such"),
        (["cp"], "prefopt recipes cp --help"),
        (["lst"], "invalid choice: 'lst'"),
        (["ls", "--all"], "unknown option --all"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "vlm"]) == 0
    assert capsys.readouterr().out == recipe("vlm").text


@pytest.mark.parametrize("arguments", [["--help"], ["cp", "--help"], ["cp", "dpo"]])
def test_it_loads_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"""
import sys
from prefopt.cli.main import main
try:
    main(["recipes", *{arguments!r}])
except SystemExit as end:
    assert not end.code
assert not {heavy} & set(sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 0 < len(printed.splitlines()) <= 60
