"""The parser of a command's own options: a mistake is one message, like any other of the program's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from prefopt.cli.errors import UserError

__all__ = ["OwnParser"]


class OwnParser(argparse.ArgumentParser):
    """As argparse's, without abbreviations, and ``--some_option`` may be written ``--some-option``. A mistake is a
    `UserError`; of an unknown option with the nearest name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        known = {*self.flags()}
        if wrong := [flag for flag in map(flag_of, args) if flag is not None and flag not in known]:
            from prefopt.cli.run_file import nearest

            names = [name.lstrip("-") for name in known]
            self.error("; ".join(f"unknown option {flag}{nearest(flag.lstrip('-'), names)}" for flag in wrong))
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return options

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        known = {*self.flags()}
        return super().parse_known_args([written(text) if flag_of(text) in known else text for text in args], namespace)

    def flags(self) -> Iterator[str]:
        """The options, those of its subcommands among them."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.flags()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def flag_of(text: str) -> str | None:
    """The option that an argument names, with underscores; None for other arguments."""
    return "--" + text.partition("=")[0][2:].replace("-", "_") if text.startswith("--") else None


def written(text: str) -> str:
    """An argument that names an option, as the parser knows it."""
    _, equals, value = text.partition("=")
    return f"{flag_of(text)}{equals}{value}"
