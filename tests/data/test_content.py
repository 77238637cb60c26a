"""Hashes of prepared rows: the same content, the same number, wherever its images lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt.data import content
from prefopt.data.content import hashes_of_rows, hashes_of_set

PIXELS = os.urandom(9000)


def rows(images: list[dict[str, bytes | str | None]]) -> Dataset:
    return Dataset.from_dict({"images": [[image] for image in images], "row": range(len(images))})


def test_embedded_images_count_by_their_bytes() -> None:
    """Not by their names; and one byte in the middle counts."""
    changed = PIXELS[:5000] + bytes([PIXELS[5000] ^ 1]) + PIXELS[5001:]
    images = [
        {"bytes": PIXELS, "path": "a"},
        {"bytes": PIXELS, "path": "b"},
        {"bytes": changed, "path": "a"},
        {"bytes": PIXELS[:-1], "path": "a"},
    ]
    for hashes in (hashes_of_set(rows(images)).tolist(), hashes_of_rows(rows(images))):
        assert hashes[0] == hashes[1]
        assert len(set(hashes)) == 3


def test_images_in_files_count_by_size_and_end(tmp_path: Path) -> None:
    for name, data in {
        "a": PIXELS,
        "b": PIXELS,
        "c": PIXELS[:-1] + bytes([PIXELS[-1] ^ 1]),
        "d": b"\0" + PIXELS,
    }.items():
        (tmp_path / name).write_bytes(data)
    hashes = hashes_of_set(rows([{"bytes": None, "path": str(tmp_path / name)} for name in "abcd"])).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_bytes_are_never_written_out_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would be fifty times slower."""
    texts: list[str] = []
    monkeypatch.setattr(content, "repr", lambda value: texts.append(repr(value)) or texts[-1], raising=False)
    hashes_of_set(rows([{"bytes": PIXELS, "path": None}]))
    assert 0 < len("".join(texts)) < 200
