"""A run described in YAML: its values, and the line each of them stands on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["RunFile", "nearest", "read_run_file", "without_config"]


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
    text = Path(path).read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: must be a mapping of option names to values, such as 'beta: 0.1'")
    lines: dict[str, int] = {}
    for key_node, _ in root.value:
        key, line = _name(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise ValueError(f"{path}:{line}: {key!r} stands here and in line {lines[key]}; remove one of them")
        lines[key] = line
    values = {_name(key): value for key, value in values.items()}
    return RunFile(path, values, lines, _environment(values.pop("env", None), f"{path}:{lines.get('env')}"))


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
