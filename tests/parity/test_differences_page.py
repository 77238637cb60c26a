"""``docs/differences.md`` and the tests of the differences name each other."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "differences.md"


def names_in(pattern: str) -> set[str]:
    sources = [file.read_text() for file in TESTS.glob(pattern)]
    return {name for source in sources for name in re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)}


def test_every_test_on_the_page_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert len(named) > 30
    assert named <= names_in("parity/test_*.py") | names_in("compat/test_*.py")


def test_every_difference_has_its_line() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert names_in("parity/test_differences_*.py") - names_in("parity/test_differences_page.py") - named == set()
