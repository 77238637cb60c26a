"""A run described in YAML: its values, and the line each of them stands on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.cli.usage import METHODS

__all__ = ["RunFile", "method_and_arguments", "nearest", "read_run_file", "read_yaml", "without_config"]

MAX_BYTES, MAX_NODES = 200_000, 20_000
"""Of a file of options."""
MAX_DIGITS = 100
"""Of a number; YAML's have base 60, too, which take the square of their length."""
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class RefusedError(Exception):
    """A file is not to be read; the message is what comes after its path."""


class Loader(yaml.SafeLoader):
    """Stops at the first node that is too many, and at numbers that are too long."""

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise RefusedError(f": has more than {MAX_NODES:,} entries")
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
            raise RefusedError(f":{node.start_mark.line + 1}: a number of {len(node.value):,} characters stands here")
        return node


@dataclass(frozen=True)
class RunFile:
    """The top level of a YAML file, dashes in keys read as underscores."""

    path: str
    values: Mapping[str, Any]
    lines: Mapping[str, int]
    """Line of each key, from 1."""
    env: Mapping[str, str]
    """The ``env:`` block: environment variables to set."""

    def where(self, key: str) -> str:
        """``file:line`` of a key."""
        return f"{self.path}:{self.lines[key]}"

    def set_environment(self) -> None:
        os.environ.update(self.env)


def read_run_file(path: str | Path) -> RunFile:
    """Reads a YAML file.

    Raises:
        ValueError: The file is no valid YAML, its top level or ``env`` is no mapping, or a key stands there twice.
        FileNotFoundError: There is no such file.
    """
    path = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; --config wants the path of a YAML file")
    values, lines = read_yaml(path)
    return RunFile(path, values, lines, _environment(values.pop("env", None), f"{path}:{lines.get('env')}"))


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The top level of a YAML file, and the line of each of its keys; dashes in keys are underscores.

    Nothing is built before the file is known to be small with all its aliases written out: a few lines of them may
    stand for more than any memory holds. Reading ends with the first entry that is too many.

    Raises:
        ValueError: It is no valid YAML, no mapping, too large, nested too deep, or a key stands in a mapping twice.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes, more than the {MAX_BYTES:,} of a file of options")
    try:
        loader = Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        problem = _problem(root)
        values = loader.construct_document(root) if problem is None else {}
    except RefusedError as error:
        raise ValueError(f"{path}{error}") from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of text, numbers and dates that are none
        raise ValueError(f"{path}: is no valid YAML: {error}") from error
    if problem is not None:
        raise ValueError(f"{path}{problem}")
    lines = {_name(key.value): key.start_mark.line + 1 for key, _ in root.value}  # type: ignore[union-attr]
    return {_name(key): value for key, value in values.items()}, lines


def _problem(root: yaml.Node | None) -> str | None:
    """Why a file is not to be read, after its path; None where it is."""
    if not isinstance(root, yaml.MappingNode):
        return ": must be a mapping of option names to values, such as 'beta: 0.1'"
    counted: dict[int, int] = {}
    mappings: list[yaml.MappingNode] = []
    if _count(root, counted, mappings) > MAX_NODES:
        return f": has more than {MAX_NODES:,} entries, with its aliases written out"
    for node in mappings:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = _name(key.value) if node is root else f"{key.tag} {key.value}"
            line = key.start_mark.line + 1
            if name in lines:
                return f":{line}: {key.value!r} stands here and in line {lines[name]}; remove one of them"
            lines[name] = line
    return None


def _count(node: yaml.Node, counted: dict[int, int], mappings: list[yaml.MappingNode]) -> int:
    """How many nodes there are at and under this one where aliases are written out; of one that holds itself, many."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = MAX_NODES + 1
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        mappings.append(node)
        parts = [part for item in node.value for part in item]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    counted[id(node)] = 1 + sum(_count(part, counted, mappings) for part in parts)
    return counted[id(node)]


def _environment(block: Any, where: str) -> dict[str, str]:
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise ValueError(f"{where}: env must be a mapping of variable names to values, got {block!r}")
    return {str(key): str(value) for key, value in block.items()}


def _name(key: Any) -> str:
    return str(key).replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is closest, or nothing where none is close.

    Example:
        >>> nearest("bta", ["beta", "seed"])
        "; did you mean 'beta'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def without_config(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without ``--config FILE`` or ``--config=FILE``, and the file."""
    rest: list[str] = []
    path, items = None, iter(arguments)
    for item in items:
        if item == "--config":
            path = next(items, None)
            if path is None:
                raise ValueError("--config wants the path of a YAML file")
        elif item.startswith("--config="):
            path = item.removeprefix("--config=")
        else:
            rest.append(item)
    return rest, path


def method_and_arguments(command: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What ``prefopt COMMAND RUN.yaml --option value`` asks for: the file's method, and the arguments of that method's
    command.

    Raises:
        ValueError: The file is not named first, or its method is none.
        FileNotFoundError: There is no such file.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"prefopt {command} wants the run file first: prefopt {command} RUN.yaml --option value")
    path, *options = arguments
    run_file = read_run_file(path)
    method = run_file.values.get("method", "dpo")
    if method not in METHODS:
        raise ValueError(f"{run_file.where('method')}: method={method!r}: must be one of {', '.join(METHODS)}")
    return method, ["--config", path, *options]
