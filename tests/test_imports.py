"""Imports go one way, and the package's own import costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
MAY_IMPORT = {
    "types": set(),
    "files": set(),
    "terminal": set(),
    "checkpoints": {"files", "types"},
    "report": {"files", "terminal"},
    "losses": {"types"},
    "objective": {"types", "losses"},
    "normalise": {"types"},
    "batching": {"types", "data"},
    "scoring": {"types", "losses", "batching"},
    "reference": {"files", "types", "scoring"},
    "metrics": {"types"},
    "data": {"files", "terminal", "types"},
    "step": {"types", "objective", "scoring", "metrics"},
    "trainer": {
        "files",
        "terminal",
        "checkpoints",
        "report",
        "types",
        "objective",
        "normalise",
        "batching",
        "scoring",
        "reference",
        "metrics",
        "data",
        "step",
    },
    "inspection": {
        "files",
        "terminal",
        "checkpoints",
        "types",
        "objective",
        "batching",
        "scoring",
        "reference",
        "metrics",
        "data",
        "step",
        "report",
        "trainer",
    },
    "recipes": {"files"},
    "sweep": {"files", "terminal", "checkpoints", "types", "reference", "data", "report", "trainer"},
    "cli": {
        "files",
        "terminal",
        "trainer",
        "data",
        "scoring",
        "report",
        "inspection",
        "recipes",
        "sweep",
        "quickstart",
    },
    "quickstart": {"terminal", "report", "trainer"},
}
"""Stage -> the stages it may know, beside itself."""
ONLY_THE_TRAINER_KNOWS = {"accelerate"}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_stage_has_its_place() -> None:
    assert {stage for stage, _ in files()} - {"__init__", "__main__"} == set(MAY_IMPORT)


@pytest.mark.parametrize(("stage", "path"), files(), ids=lambda value: str(value)[-40:])
def test_imports_go_one_way(stage: str, path: Path) -> None:
    names = imports_of(path)
    if stage not in ("__init__", "__main__"):
        known = {name.split(".")[1] for name in names if name.startswith("prefopt.")}
        assert known & set(MAY_IMPORT) <= MAY_IMPORT[stage] | {stage}
    if stage not in ("trainer", "cli", "quickstart"):
        assert not {name.split(".")[0] for name in names} & ONLY_THE_TRAINER_KNOWS
        assert not names & {"transformers.Trainer", "transformers.TrainingArguments"}


def test_no_relative_imports() -> None:
    for _, path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, prefopt; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); dir(prefopt)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported() -> None:
    assert set(prefopt.__all__) == set(prefopt.HOME_OF)
    for name in prefopt.__all__:
        assert getattr(prefopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        prefopt.nonsense  # noqa: B018
