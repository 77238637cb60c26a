"""The examples of docs/data.md and of the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import prefopt.data


def test_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "data.md"
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 30
    assert result.failed == 0


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(prefopt.data.__path__)])
def test_the_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"prefopt.data.{name}")).failed == 0
