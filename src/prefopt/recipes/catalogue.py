"""The recipes by name: what each is for, and on which papers it stands, as its own first lines say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

__all__ = ["Recipe", "recipe", "recipe_names"]

FOLDER = Path(__file__).parent
FIRST = ("dpo", "simpo", "cpo", "cpo-simpo", "alphapo", "tpo", "tpo-l", "mpo", "ipo", "robust", "tr-dpo")
"""Methods, in the order in which they are shown; ways of training come after them."""
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


@dataclass(frozen=True)
class Recipe:
    """A run file that comes with the package.

    Its first line says what it is for (``# SimPO: no reference model; ...``), its second one how it is run, and the
    comments after them name the papers and where in them the values stand.
    """

    name: str
    text: str

    @property
    def title(self) -> str:
        return self._first_line[0]

    @property
    def purpose(self) -> str:
        return self._first_line[1]

    @property
    def papers(self) -> tuple[str, ...]:
        """arXiv numbers that stand before the first option, each once, in their order."""
        head = self.text.partition("\nmethod:")[0]
        return tuple(dict.fromkeys(ARXIV.findall(head)))

    @cached_property
    def options(self) -> dict[str, object]:
        """The options as the file has them; the method among them."""
        return yaml.safe_load(self.text)

    @property
    def method(self) -> str:
        """The command that trains it: ``dpo``, ``cpo`` or ``tpo``."""
        return str(self.options["method"])

    @property
    def _first_line(self) -> tuple[str, str]:
        title, _, purpose = self.text.split("\n", 1)[0].removeprefix("# ").partition(": ")
        return title, purpose


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes: methods first, then ways of training by name."""
    found = {path.stem for path in FOLDER.glob("*.yaml")}
    return (*FIRST, *sorted(found - {*FIRST}))


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        KeyError: There is none.
    """
    if name not in recipe_names():
        raise KeyError(name)
    return Recipe(name, (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
