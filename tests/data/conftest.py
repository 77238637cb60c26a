"""Real tokenizers and real data, where the shared folder is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another run cached is found, and nothing is left behind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def qwen2(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")


@pytest.fixture(scope="session")
def stories(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260K")


@pytest.fixture(scope="session")
def ultrafeedback(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "data" / "ultrafeedback" / "train_clean.jsonl").read_text().splitlines()
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, lines)]
