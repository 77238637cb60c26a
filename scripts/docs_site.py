"""Hooks of mkdocs: README and SECURITY as pages of the site, and no public name without documentation.

The build ends with an error that names what is public (``PUBLIC``) and has no docstring, or is on no page under
``docs/reference``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PUBLIC: dict[str, tuple[str, ...]] = {
    "prefopt": (),
    "prefopt.losses": (),
    "prefopt.report.curves": ("draw",),
    "prefopt.report.diagnosis": ("diagnose", "Finding"),
    "prefopt.inspection.merging": ("merge", "Merged", "NotTheSameError"),
    "prefopt.inspection.comparing.comparison": ("compared", "Comparison", "Settings"),
    "prefopt.trainer.ending.signals": ("InterruptedRun", "TerminatedRun"),
    "prefopt.trainer.guards.nonfinite": ("NonFiniteStepError",),
    "prefopt.trainer.guards.out_of_memory": ("MicroBatchMemoryError",),
    "prefopt.trainer.saving.continuation": ("ResumeError",),
}
"""Module -> its public names; none: all that are in its ``__all__``."""
BESIDE = {"README.md": "overview.md", "SECURITY.md": "security.md"}
"""File beside ``docs`` -> its page."""


def on_config(config: Any) -> None:
    """Before anything is built: every public name is documented; folders in the navigation become their pages."""
    from mkdocs.exceptions import PluginError

    wrong = [*undocumented(PUBLIC), *without_page(PUBLIC, ROOT / "docs" / "reference")]
    if wrong:
        raise PluginError("public names that are not documented:\n" + "\n".join(f"  {line}" for line in wrong))
    config["nav"] = [{title: pages(entry) for title, entry in item.items()} for item in config["nav"]]


def pages(entry: Any) -> Any:
    """An entry of the navigation; in place of a folder (``losses/``) its pages, the index first."""
    if isinstance(entry, list):
        return [{title: pages(part) for title, part in e.items()} if isinstance(e, dict) else e for e in entry]
    if not entry.endswith("/"):
        return entry
    found = sorted(path.name for path in (ROOT / "docs" / entry).glob("*.md"))
    return [f"{entry}{name}" for name in sorted(found, key=lambda name: name != "index.md")]


def on_files(files: Any, config: Any) -> Any:
    """The pages of files that lie beside ``docs``."""
    from mkdocs.structure.files import File

    for name, page in BESIDE.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=moved_links(text)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links out of ``docs`` lead to those pages."""
    return moved_links(markdown)


def moved_links(markdown: str) -> str:
    """
    >>> moved_links("[speed](../README.md#speed), [s](SECURITY.md)")
    '[speed](overview.md#speed), [s](security.md)'
    """
    for name, page in BESIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}", f"]({page}", markdown)
    return markdown


def public_names(modules: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """Dotted name and object of everything that is public."""
    for module, names in modules.items():
        home = import_module(module)
        for name in names or home.__all__:
            yield f"{module}.{name}", getattr(home, name)


def undocumented(modules: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Public functions, classes, and public methods and properties that a class defines, without a docstring."""
    found = []
    for name, value in public_names(modules):
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # of a constant griffe reads the string below it
        if not (value.__doc__ or "").strip():
            found.append(f"{name}: has no docstring")
        for part, member in vars(value).items() if inspect.isclass(value) else ():
            documented = inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
            if documented and not part.startswith("_") and not (inspect.getdoc(getattr(value, part)) or "").strip():
                found.append(f"{name}.{part}: has no docstring")
    return found


def without_page(modules: Mapping[str, tuple[str, ...]], folder: Path) -> list[str]:
    """Public names that no page of the reference asks for, and those that one asks for that are not public."""
    asked = {
        name for page in folder.rglob("*.md") for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE)
    }
    names = {name for name, _ in public_names(modules)}
    missing = [f"{name}: is on no page of docs/reference" for name in sorted(names - asked)]
    return missing + [f"{name}: is in docs/reference, and not public" for name in sorted(asked - names)]
