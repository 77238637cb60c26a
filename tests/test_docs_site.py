"""The site: it builds without a warning, and not at all while a public name is undocumented."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the site needs prefopt[docs]")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site() -> Any:
    """The hooks of mkdocs, a file that mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "losses" / "index.html").read_text()
    assert 'id="prefopt.losses.ipo"' in page
    for found in (tmp_path / "site").rglob("*.html"):
        assert "fonts.googleapis" not in found.read_text()


def test_a_public_name_without_documentation_ends_the_build(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.exceptions import PluginError

    class Half:
        """Documented, but for a method."""

        def told(self) -> None:
            """Yes."""

        def untold(self) -> None: ...

        @property
        def value(self) -> int:
            return 1

    def silent() -> None: ...

    module = types.ModuleType("planted")
    module.__all__, module.silent, module.Half, module.LIMIT = ["silent", "Half", "LIMIT"], silent, Half, 3
    monkeypatch.setitem(sys.modules, "planted", module)
    monkeypatch.setattr(site, "PUBLIC", {"planted": ()})
    with pytest.raises(PluginError) as stopped:
        site.on_config({})
    told = str(stopped.value)
    for expected in (
        "planted.silent: has no docstring",
        "planted.Half.untold: has no docstring",
        "planted.Half.value: has no docstring",
        "planted.LIMIT: is on no page of docs/reference",
        "prefopt.DPOTrainer: is in docs/reference, and not public",
    ):
        assert expected in told
    assert "Half.told" not in told


def test_every_public_name_is_documented(site: Any) -> None:
    assert site.undocumented(site.PUBLIC) == []
    assert site.without_page(site.PUBLIC, ROOT / "docs" / "reference") == []
