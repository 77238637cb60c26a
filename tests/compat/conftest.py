"""What the tests of TRL's public behaviour share: tiny models on disk and data sets of seventeen rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Family name -> folder with a model and its tokenizer, as a hub repository would hold them."""
    root = tmp_path_factory.mktemp("models")

    class Folders(dict[str, str]):
        def __missing__(self, family: str) -> str:
            self[family] = save_tiny(root / f"tiny-{family}", family)
            return self[family]

    return Folders()


@pytest.fixture
def model(model_folder: dict[str, str]) -> str:
    """A model by its path, as most users name one."""
    return model_folder["llama"]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output folder; the working directory is a temporary one too."""
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "out")
