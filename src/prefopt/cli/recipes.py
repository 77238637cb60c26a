"""``prefopt recipes``: what run files there are, and a copy of one of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from prefopt.cli.errors import UserError
from prefopt.cli.own_parser import OwnParser
from prefopt.cli.run_file import nearest
from prefopt.files import replace_file
from prefopt.recipes.catalogue import Recipe, recipe, recipe_names
from prefopt.terminal import harmless

__all__ = ["main"]

LINE = 120
"""Characters of a line where there is no terminal: a table is then cut by nobody."""


def main(arguments: Sequence[str]) -> int:
    """Runs ``prefopt recipes ls | cp NAME [FILE] | show NAME``."""
    options = make_parser().parse_args(list(arguments) or ["ls"])
    if options.action == "cp":
        copy(found(options.name), options.file, force=options.force)
    elif options.action == "show":
        print(found(options.name).text, end="")
    else:
        show_table()
    return 0


def make_parser() -> OwnParser:
    parser = OwnParser(prog="prefopt recipes", description="Commented run files with what the papers advise.")
    actions = parser.add_subparsers(dest="action", metavar="ls | cp | show", required=True)
    actions.add_parser("ls", help="what there is: name, method, what for, papers")
    cp = actions.add_parser("cp", help="copy one, to be changed and trained with")
    cp.add_argument("name", metavar="NAME", help="of a recipe, as prefopt recipes ls shows it")
    cp.add_argument("file", metavar="FILE", nargs="?", type=Path, help="where to; NAME.yaml here, if not given")
    cp.add_argument("--force", action="store_true", help="also over a file that is there")
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME", help="of a recipe")
    return parser


def found(name: str) -> Recipe:
    """The recipe of this name, which may be written ``NAME.yaml``, or a message with the nearest one."""
    wanted = name.removesuffix(".yaml").lower().replace("_", "-")
    try:
        return recipe(wanted)
    except KeyError:
        names = recipe_names()
        raise UserError(
            f"there is no recipe {name!r}{nearest(wanted, names)}; there are {', '.join(names)} (prefopt recipes ls)"
        ) from None


def copy(chosen: Recipe, file: Path | None, *, force: bool) -> None:
    """Write the recipe to a file, and say what comes next."""
    path = Path(f"{chosen.name}.yaml") if file is None else file
    if path.is_dir():
        path = path / f"{chosen.name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path} is there already: name another file, or write over it with --force")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    shown = harmless(shlex.quote(str(path))).replace("\n", "\\n")  # one line, which stays a comment
    command = f"# prefopt train {chosen.name}.yaml\n"
    try:
        replace_file(path, chosen.text.replace(command, f"# prefopt train {shown}\n", 1))
    except OSError as error:
        raise UserError(f"{path} was not written: {error.strerror}") from error
    print(f"{shown}: {chosen.title}. Put your model and data in, then\n")
    print(f"  prefopt check {shown}   # options, data, one step, memory, time\n  prefopt train {shown}")


def show_table() -> None:
    """All recipes, a row each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = LINE
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("command", no_wrap=True)
    table.add_column("what for")
    table.add_column("papers (arXiv)", no_wrap=True)
    for name in recipe_names():
        row = recipe(name)
        table.add_row(name, row.method, Text(row.purpose), "\n".join(row.papers))
    console.print(table)
    console.print("\nprefopt recipes cp NAME copies one; prefopt recipes show NAME prints it.", highlight=False)
