"""Names of all options, read from the source of the configs: a typing error is found before torch is imported."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from prefopt.cli.run_file import RunFile, nearest, read_run_file, without_config

__all__ = ["LAUNCH_ONLY", "check_given", "check_names", "known_names", "missing_options"]

PACKAGE = Path(__file__).parents[1]
LAUNCH_ONLY = ("accelerate_config",)
"""Options of ``prefopt`` itself: they say how to launch, not what to train."""
SOURCES = {
    "trainer/config_base.py": ("PreferenceConfig",),
    "cli/model_config.py": ("ModelConfig", "ScriptArguments"),
    "data/mixture.py": ("DatasetMixtureConfig",),
}
HIDDEN = {"user_set"}


def check_names(method: str, arguments: Sequence[str], own: Iterable[str] = ()) -> None:
    """Refuses unknown flags and unknown keys of the ``--config`` file, all in one message.

    Args:
        method: ``dpo``, ``cpo`` or ``tpo``.
        arguments: those of ``prefopt METHOD``.
        own: options that the command has beside those of a run, which a flag may have been meant for.

    Raises:
        ValueError: with ``file:line`` for each key and the nearest name; or the file is for another method.
        FileNotFoundError: There is no such file.
    """
    known = known_names(method)
    flags, path = without_config(arguments)
    problems = [] if path is None else _wrong_keys(method, read_run_file(path), known)
    for flag in _flags(flags):
        name = flag.lstrip("-").replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            problems.append(f"unknown option {flag}{nearest(name, {*own, *known})}")
    if problems:
        raise ValueError("\n".join(problems))


def _wrong_keys(method: str, run_file: RunFile, known: frozenset[str]) -> list[str]:
    named = run_file.values.get("method", method)
    problems = []
    if named != method:
        problems.append(f"{run_file.where('method')}: method={named!r}: this is prefopt {method}; run prefopt train")
    for key in run_file.values:
        if key not in known | {"method"}:
            problems.append(f"{run_file.where(key)}: unknown key {key!r}{nearest(key, known)}")
    return problems


def check_given(arguments: Sequence[str]) -> None:
    """Refuses a run that names no model or no data, in the flags or in the ``--config`` file.

    Raises:
        ValueError: with what is missing.
        FileNotFoundError: There is no such file.
    """
    flags, path = without_config(arguments)
    values = {} if path is None else read_run_file(path).values
    given = {flag.lstrip("-").replace("-", "_") for flag in _flags(flags)}
    if missing := missing_options(given | {key for key, value in values.items() if value is not None}):
        raise ValueError("\n".join(missing))


def missing_options(given: Collection[str]) -> list[str]:
    """What a run must name and the options that are given do not."""
    missing = []
    if "model_name_or_path" not in given:
        missing.append("model_name_or_path: name the model to train, a folder or a Hub name")
    if "dataset_name" not in given and "datasets" not in given:
        missing.append("dataset_name: name the data, a file, a folder or a Hub name (or datasets: in YAML)")
    return missing


@functools.cache
def known_names(method: str) -> frozenset[str]:
    """The options of ``prefopt METHOD``, those of ``accelerate launch`` among them."""
    names = set(LAUNCH_ONLY)
    for source, classes in {**SOURCES, "trainer/config.py": (f"{method.upper()}Config",)}.items():
        names |= set(_fields(PACKAGE / source, classes))
    names |= set(_fields(_folder("transformers") / "training_args.py", ("TrainingArguments",)))
    names |= set(_added_arguments(_folder("accelerate") / "commands" / "launch.py"))
    return frozenset(names - HIDDEN)


def _fields(path: Path, classes: Iterable[str]) -> Iterator[str]:
    """Annotated names in the body of the classes, without constants and private ones."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for item in node.body:
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and item.target.id[0].islower()
                ):
                    yield item.target.id


def _added_arguments(path: Path) -> Iterator[str]:
    """Flags that the calls of ``add_argument`` name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    yield str(argument.value).lstrip("-").replace("-", "_")


def _folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed; install prefopt with its dependencies")
    return Path(next(iter(spec.submodule_search_locations)))


def _flags(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            yield argument.partition("=")[0]
