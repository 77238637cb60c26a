"""README and docs say what is so: examples run, links lead somewhere, trees and tables are those of the code."""

from __future__ import annotations

import dataclasses
import doctest
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefopt
from prefopt import CPOConfig, DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TPOConfig, types
from prefopt.cli.launch import CONFIGS
from prefopt.cli.main import main
from prefopt.cli.train import make_parser
from prefopt.cli.usage import COMMANDS
from prefopt.quickstart import ASSETS, preference_set
from prefopt.trainer.config_help import HELP

ROOT = Path(__file__).resolve().parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [README, *sorted(DOCS.rglob("*.md"))]}
CONFIG_PAGE = PAGES["docs/configuration.md"]
TRAINERS = (DPOConfig, CPOConfig, TPOConfig)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str, header: str) -> Iterator[list[str]]:
    """The rows of every table with this first line, but its first two."""
    for match in re.finditer(rf"^{re.escape(header)}\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        yield match[1].splitlines()[1:]


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if ">>> " in text])
def test_examples_run(page: str) -> None:
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/migrating-from-trl.md"])
def test_programs_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of Python that are no sessions, one after another; those of the losses have a test of their own."""
    monkeypatch.chdir(tmp_path)
    programs = blocks(PAGES[page], "python")
    assert programs
    names: dict = {}
    for program in programs:
        exec(program, names)


def test_no_program_is_left_out() -> None:
    have = {page for page, text in PAGES.items() for block in blocks(text, "python") if ">>> " not in block}
    assert {page for page in have if "losses" not in page} == {"README.md", "docs/migrating-from-trl.md"}


def test_the_command_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for split, rows in (("train", preference_set("train", 32)), ("test", preference_set("held_out", 4))):
        rows.to_json(f"data/{split}.jsonl")
    (run_file,) = blocks(PAGES["README.md"], "yaml")
    Path("run.yaml").write_text(run_file)
    (command,) = re.findall(r"^prefopt (dpo .*)$", PAGES["README.md"], flags=re.MULTILINE)
    ours = ["--model_name_or_path", str(ASSETS), "--dataset_name", "data", "--max_steps", "1", "--use_cpu"]
    assert main([*shlex.split(command), *ours]) == 0
    assert Path("runs/dpo/model.safetensors").exists()


def test_the_run_file_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It parses, command line over file over default; the mistake on the page gives the message on the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "another")  # and restored afterwards
    (run_file,) = blocks(CONFIG_PAGE, "yaml")
    Path("run.yaml").write_text(run_file)
    (arguments,) = re.findall(r"^prefopt cpo (--config.*)$", CONFIG_PAGE, flags=re.MULTILINE)
    flags = [*shlex.split(arguments), "--use_cpu"]
    _, training, model, mixture = make_parser("cpo").parse_args_and_config(flags)
    assert (training.beta, training.simpo_gamma, training.label_smoothing) == (2.5, 1.0, 0.0)
    assert model.use_peft
    assert mixture.datasets[0].columns == ["chosen", "rejected"]
    assert os.environ["WANDB_PROJECT"] == "preferences"
    (session,) = [block for block in blocks(CONFIG_PAGE, "text") if block.startswith("$ prefopt ")]
    command, message = session.split("\n", 1)
    assert main(shlex.split(command)[2:]) == 2
    assert capsys.readouterr().err == message


# -- names that the pages mention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", PAGES[page]):
        assert ((ROOT / page).parent / target).resolve().is_file(), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    for path in re.findall(r"`((?:src|tests|docs|examples|scripts)/[\w./*-]*)`", PAGES[page]):
        assert list(ROOT.glob(path)), path


def test_the_index_has_every_page() -> None:
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)]+\.md)\)", PAGES["docs/index.md"])}
    assert linked == {*DOCS.glob("*.md"), *DOCS.glob("design/*.md"), DOCS / "losses/index.md"} - {DOCS / "index.md"}


def test_tests_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGES["README.md"]))
    found = {name for file in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 25
    assert named <= found


def test_notation_names_the_types_there_are() -> None:
    text = PAGES["docs/notation.md"]
    for kind, attribute in set(re.findall(r"`([A-Z]\w+)\.(\w+)`", text)):
        assert attribute in {*dir(getattr(types, kind)), *getattr(types, kind).__dataclass_fields__}, (kind, attribute)
    defined = {name for name, kind in vars(types).items() if dataclasses.is_dataclass(kind)}
    assert {name for name in defined if f"`{name}`" not in text} == set()


# -- trees and tables ----------------------------------------------------------------------------------------------


def tree_files(tree: str) -> Iterator[str]:
    """The files of an indented tree; ``{a,b}.x`` is two, and a folder's line stands for its ``__init__.py`` too."""
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
            if (ROOT / "".join(folders) / "__init__.py").exists() and depth:
                yield "".join([*folders, "__init__.py"])
            continue
        choices = re.match(r"\{(.*)\}(.*)", name)
        for file in [f"{stem}{choices[2]}" for stem in choices[1].split(",")] if choices else [name]:
            yield "".join([*folders, file])


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    (tree,) = blocks(PAGES["README.md"], "text")
    package = Path(prefopt.__file__).parent
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(tree_files(tree)) == sorted(str(path.relative_to(ROOT)) for path in files)


def options_of(config: type) -> dict[str, dataclasses.Field]:
    """The options that this package gives a text, without the one that fills in itself."""
    described = {field.name: field for field in dataclasses.fields(config) if field.metadata.get("help")}
    if config in TRAINERS:  # the texts of the others are transformers'
        described = {name: field for name, field in described.items() if field.metadata["help"] == HELP.get(name)}
    return {name: field for name, field in described.items() if name != "user_set"}


def default_of(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    return f"`{field.metadata['default'] if field.default is dataclasses.MISSING else field.default}`"


def meaning_of(field: dataclasses.Field) -> str:
    return field.metadata["help"].replace("%%", "%")


def test_the_options_of_the_trainers() -> None:
    options = [options_of(config) for config in TRAINERS]
    expected = []
    for name in {name for own in options for name in own}:
        cells = [default_of(own[name]) if name in own else "-" for own in options]
        meaning = next(meaning_of(own[name]) for own in options if name in own)
        expected.append(f"| `{name}` | {' | '.join(cells)} | {meaning} |")
    shown = [row for table in tables(CONFIG_PAGE, "| option | DPO | CPO | TPO | meaning |") for row in table]
    assert sorted(shown) == sorted(expected)


def test_the_options_of_the_command_line() -> None:
    expected = [
        [f"| `{name}` | {default_of(field)} | {meaning_of(field)} |" for name, field in options_of(config).items()]
        for config in (ModelConfig, ScriptArguments, DatasetMixtureConfig)
    ]
    assert list(tables(CONFIG_PAGE, "| option | default | meaning |")) == expected


def test_the_commands_and_accelerate_configs() -> None:
    (commands,) = tables(CONFIG_PAGE, "| command | what it does |")
    assert set(re.findall(r"`prefopt (\w+)", "\n".join(commands))) == set(COMMANDS)
    (configs,) = tables(CONFIG_PAGE, "| name | what |")
    named = {name for row in configs for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {path.stem for path in CONFIGS.glob("*.yaml")}
