"""From command line and YAML to dataclasses: command line over YAML over default."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from prefopt.cli.run_file import RunFile, nearest, read_run_file, without_config

__all__ = ["PrefParser", "TrlParser"]

UNSET: Any = object()
HIDDEN = ("user_set",)
"""Fields that the parser does not offer."""
YES_OR_TEXT = ("resume_from_checkpoint",)
"""Options of text that may also be a yes or no."""


class Unknown(NamedTuple):
    """A YAML key that no option takes."""

    key: str
    value: Any
    where: str

    def as_strings(self) -> list[str]:
        """As it would stand on a command line: a true one is a bare flag."""
        return [f"--{self.key}"] if self.value is True else [f"--{self.key}", str(self.value)]


class PrefParser(HfArgumentParser):
    """Parses dataclasses' fields as options, and ``--config FILE.yaml`` for the same options in YAML.

    ``--some_option`` may be written ``--some-option``; lists take several values; ``none`` or ``null`` is None for an
    option that may be None and is not text; dicts are JSON. A dataclass gets only what was given, so that it can tell
    a default from a choice. Top-level ``env:`` in the YAML sets environment variables.

    Args:
        dataclass_types: One dataclass or several; ``parse_args_and_config`` returns an instance of each.
        ignored_keys: YAML keys that are not for the dataclasses.

    Raises:
        ValueError: A dataclass has a field called ``config``.
    """

    def __init__(self, dataclass_types: Any = None, *, ignored_keys: Iterable[str] = (), **kwargs: Any) -> None:
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or ())
        self._annotations: dict[str, Any] = {}
        for kind in types:
            hints = get_type_hints(kind)
            self._annotations |= {
                spec.name: hints[spec.name]
                for spec in dataclasses.fields(kind)
                if spec.init and spec.name not in HIDDEN
            }
            if "config" in hints:
                raise ValueError(f"{kind.__name__} has a field 'config', which is the YAML file's: rename it")
        self._ignored_keys = frozenset(ignored_keys)
        self._from_file: dict[str, Any] = {}
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(types, **kwargs)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """An instance of each dataclass, from the command line and from the file that ``--config`` names.

        Args:
            args: The command line; None: that of the process.
            return_remaining_strings: Also return, as last item, the list of what no option takes.
            fail_with_unknown_args: Refuse YAML keys that no option takes; else they are ignored. Unknown flags are
                refused unless the remaining strings are returned.
            separate_remaining_strings: Return the file's and the command line's remaining strings as two lists.

        Raises:
            ValueError: An unknown key or flag (with its line and the nearest name), or a value that does not fit.
        """
        arguments, path = without_config(sys.argv[1:] if args is None else list(args))
        run_file = None if path is None else read_run_file(path)
        unknown: list[Unknown] = []
        problems: list[str] = []
        self._from_file = {}
        if run_file is not None:
            run_file.set_environment()
            unknown, problems = self._take(run_file)
        *outputs, rest = self._parse(arguments, run_file, problems)
        if return_remaining_strings:
            from_file = [text for item in unknown for text in item.as_strings()]
            return (*outputs, from_file, rest) if separate_remaining_strings else (*outputs, from_file + rest)
        self._refuse(unknown if fail_with_unknown_args else [], rest)
        return tuple(outputs)

    def parse_run_file(self, run_file: RunFile) -> tuple[Any, ...]:
        """An instance of each dataclass, from a file that was read, or from what could stand in one.

        Raises:
            ValueError: An unknown key, or a value that does not fit.
        """
        self._from_file = {}
        unknown, problems = self._take(run_file)
        *outputs, rest = self._parse([], run_file, problems)
        self._refuse(unknown, rest)
        return tuple(outputs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's, but an option of a dataclass that was not given is absent from the namespace."""
        given = _Options(**{**dict.fromkeys(self._annotations, UNSET), **self._from_file})
        space, rest = super().parse_known_args(args, given if namespace is None else namespace)
        for name in self._annotations:
            value = getattr(space, name, UNSET)
            if value is UNSET:
                delattr(space, name)
            elif value == [None]:  # `none` for a list
                setattr(space, name, None)
        return space, rest

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage of two hundred options."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: dataclasses.Field[Any]) -> None:
        if field.name in HIDDEN:
            return
        takes_none = _none_is_none(field.type)  # before the call below narrows the type
        HfArgumentParser._parse_dataclass_field(parser, field)
        if takes_none:
            action = parser._option_string_actions[f"--{field.name}"]
            action.type = _or_none(action.type)

    def _parse(self, arguments: Sequence[str], run_file: RunFile | None, problems: Sequence[str]) -> tuple[Any, ...]:
        """Makes the dataclasses; an error of theirs names the lines of the file that it is about, and comes with the
        ``problems`` that the file has already."""
        try:
            made = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=bool(sys.argv[0])
            )
        except ValueError as error:
            if run_file is None:
                raise
            places = [run_file.where(key) for key in run_file.values if re.search(rf"\b{key}=", str(error))]
            raise ValueError("\n".join([*problems, str(error), *(f"(set in {place})" for place in places)])) from error
        if problems:
            raise ValueError("\n".join(problems))
        return made

    def _take(self, run_file: RunFile) -> tuple[list[Unknown], list[str]]:
        """Keeps the file's values for the options they are of; returns the rest, and what is wrong with values."""
        unknown, problems = [], []
        for key, value in run_file.values.items():
            if key in self._ignored_keys:
                continue
            if key not in self._annotations:
                unknown.append(Unknown(key, value, run_file.where(key)))
                continue
            action = self._option_string_actions[f"--{key}"]
            try:
                self._from_file[key] = self._converted(action, self._annotations[key], value)
                action.required = False
            except argparse.ArgumentError as error:
                problems.append(f"{run_file.where(key)}: {key}: {error.message}")
        return unknown, problems

    def _converted(self, action: argparse.Action, annotation: Any, value: Any) -> Any:
        """A YAML value as the option's type."""
        if value is None or (isinstance(value, dict) and dict in _origins(annotation)):
            return value
        if isinstance(value, list):
            if list not in _origins(annotation):
                raise argparse.ArgumentError(None, f"takes one value, got the list {value!r}")
            return [item if isinstance(item, dict) else self._scalar(action, annotation, item) for item in value]
        converted = self._scalar(action, annotation, value)
        return [converted] if action.nargs == "+" else converted

    def _scalar(self, action: argparse.Action, annotation: Any, value: Any) -> Any:
        """One value: YAML reads ``1e-6`` as text, ``no`` as False, a number where text is wanted as a number."""
        is_flag = bool in _origins(annotation)
        if isinstance(value, bool) and is_flag:
            return value
        if type(value) is int and float in _origins(annotation):  # a share may also be a count
            return value
        if isinstance(value, dict):
            raise argparse.ArgumentError(None, f"takes a single value, got the mapping {value!r}")
        if isinstance(value, bool) and "no" in (action.choices or ()) and not value:
            value = "no"
        if isinstance(value, bool) and action.dest in YES_OR_TEXT:
            value = str(value).lower()
        if isinstance(value, bool):
            raise argparse.ArgumentError(None, f"got {value}, which is neither text nor a number; put text in quotes")
        converted = self._get_value(action, str(value))
        self._check_value(action, converted)
        return converted

    def _refuse(self, unknown: Sequence[Unknown], rest: Sequence[str]) -> None:
        problems = [f"{item.where}: unknown key {item.key!r}{self._nearest(item.key)}" for item in unknown]
        problems += [f"unknown option {flag}{self._nearest(flag)}" for flag in rest if flag.startswith("--")]
        problems = problems or [f"unexpected argument {text!r}" for text in rest]
        if problems:
            raise ValueError("\n".join(problems))

    def _nearest(self, name: str) -> str:
        return nearest(name.lstrip("-").replace("-", "_"), self._annotations)


class _Options(argparse.Namespace):
    """Holds what was given; removing what was not is no error."""

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(name, None)


def _origins(annotation: Any) -> list[Any]:
    """The kinds of value an annotation allows: ``list[str] | None`` gives ``[list, NoneType]``."""
    origin = get_origin(annotation)
    if origin is None or origin in (list, dict, tuple):
        return [origin or annotation]
    return [get_origin(kind) or kind for kind in get_args(annotation)]


def _none_is_none(annotation: Any) -> bool:
    """Whether ``none`` can only mean None: the option may be None, and is no text of its own."""
    kinds = _origins(annotation)
    return type(None) in kinds and (str not in kinds or dict in kinds)


def _or_none(convert: Callable[[str], Any] | None) -> Callable[[str], Any]:
    def function(text: str) -> Any:
        if text.lower() in ("none", "null"):
            return None
        return text if convert is None else convert(text)

    function.__name__ = getattr(convert, "__name__", "str")  # argparse names the type in its message
    return function


TrlParser = PrefParser
"""The parser under TRL's name."""
