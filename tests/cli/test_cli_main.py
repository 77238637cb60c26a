"""The command ``prefopt``: help without torch, dispatch, messages instead of tracebacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt.cli import main as cli
from prefopt.cli.names import check_names, known_names
from prefopt.cli.usage import COMMANDS, METHODS, method_usage, usage


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["dpo", "--help"], ["cpo", "-h"], ["train", "--help"], ["--help-all"], []]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from prefopt.cli.main import main\n"
        f"status = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\n"
        "print('status', status, 'heavy', sorted(heavy))"
    )
    assert in_new_process(code).splitlines()[-1] == "status 0 heavy []"


def test_names_are_checked_before_torch_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.1\nbta: 0.2\n")
    code = (
        "import sys; from prefopt.cli.main import main\n"
        f"status = main(['dpo', '--config', {str(tmp_path / 'run.yaml')!r}, '--lerning-rate', '1'])\n"
        "print('status', status, 'torch' in sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert time.monotonic() - started < 10  # under a second on an idle machine
    assert done.stdout.splitlines()[-1] == "status 2 False"
    assert "run.yaml:2: unknown key 'bta'; did you mean 'beta'?" in done.stderr
    assert "unknown option --lerning-rate; did you mean 'learning_rate'?" in done.stderr


def test_help_is_short():
    assert len(usage().splitlines()) <= 60
    for method in METHODS:
        text = method_usage(method)
        assert len(text.splitlines()) <= 60
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("method", METHODS)
def test_help_names_only_options_that_exist(method):
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]+)", method_usage(method))}
    assert flags - {"config", "help_all", "option"} <= known_names(method)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_defaults_of_the_configs(method):
    import prefopt

    fields = getattr(prefopt, f"{method.upper()}Config").__dataclass_fields__ | prefopt.ModelConfig.__dataclass_fields__
    shown = re.findall(r"--(\w+) (\d[\d.]*(?:e-\d+)?)(?=[\s,]|$)", method_usage(method))
    assert len(shown) >= 6
    for name, value in shown:
        assert fields[name].default == float(value), name


@pytest.mark.parametrize("method", METHODS)
def test_names_read_from_source_are_those_of_the_parser(method):
    from accelerate.commands.launch import launch_command_parser

    from prefopt.cli.train import make_parser

    parser = {flag for flag in make_parser(method)._option_string_actions if flag.startswith("--")}
    launcher = {flag for flag in launch_command_parser()._option_string_actions if flag.startswith("--")}
    names = {flag.lstrip("-").replace("-", "_") for flag in parser | launcher | {"--accelerate_config"}}
    negated = {name for name in names if name.startswith("no_") and name.removeprefix("no_") in names}
    assert names - negated == known_names(method) - negated


def test_a_file_of_another_method_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("method: tpo\n")
    with pytest.raises(ValueError, match=r"run\.yaml:1: method='tpo'"):
        check_names("dpo", ["--config", str(tmp_path / "run.yaml")])


def test_train_takes_the_method_from_the_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "_train", lambda method, arguments: calls.append((method, arguments)) or 0)
    path = tmp_path / "run.yaml"
    for text, method in (("beta: 0.1\n", "dpo"), ("method: cpo\n", "cpo")):
        path.write_text(text)
        assert cli.main(["train", str(path), "--beta", "0.2"]) == 0
        assert calls.pop() == (method, ["--config", str(path), "--beta", "0.2"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dpi"], "there is no command 'dpi'; did you mean 'dpo'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", "--beta", "1"], "wants the run file first"),
    ],
)
def test_mistakes_are_one_message(arguments, part, capsys):
    assert cli.main(arguments) == 2
    assert part in capsys.readouterr().err


def test_an_unknown_method_in_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("seed: 1\nmethod: ppo\n")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml:2: method='ppo': must be one of dpo, cpo, tpo" in capsys.readouterr().err


def test_a_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("PREFOPT_TRACEBACK", "1")
    with pytest.raises(cli.UserError):
        cli.main(["dpi"])


def test_every_command_is_in_the_overview():
    text = usage()
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_help_all_shows_every_option(capsys):
    assert cli.main(["cpo", "--help-all"]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"--{name}" in printed for name in ("cpo_alpha", "lora_r", "dataset_name", "test_split_size", "adam_beta1")
    )


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).parent / "prefopt"
    if not command.exists():
        pytest.skip("prefopt is not installed as a command")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("usage: prefopt COMMAND")


@pytest.mark.parametrize("given", [None, "0"])
def test_large_pages_are_asked_for_unless_the_user_says(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.LARGE_PAGES, given or "")
    if given is None:
        monkeypatch.delenv(cli.LARGE_PAGES)
    assert cli.main(["--help"]) == 0
    assert os.environ[cli.LARGE_PAGES] == (given or "1")
