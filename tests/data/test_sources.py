"""Data sets by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt.data import load_source

ROWS = [{"prompt": "a", "chosen": "b", "rejected": str(number)} for number in range(4)]


def write(rows: Dataset, path: Path) -> None:
    if path.suffix in (".json", ".jsonl"):
        rows.to_json(path, lines=path.suffix == ".jsonl")
    elif path.suffix in (".csv", ".tsv"):
        rows.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path.parent / "saved")
        next((path.parent / "saved").glob("*.arrow")).rename(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(suffix: str, streaming: bool, tmp_path: Path) -> None:
    write(Dataset.from_list(ROWS), tmp_path / f"rows.{suffix}")
    loaded: Any = load_source(str(tmp_path / f"rows.{suffix}"), split="train", streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert [row["prompt"] for row in loaded] == ["a"] * 4
    assert list(load_source(str(tmp_path / f"rows.{suffix}"))) == ["train"]


def test_part_of_a_split(tmp_path: Path) -> None:
    write(Dataset.from_list(ROWS), tmp_path / "rows.jsonl")
    assert len(load_source(str(tmp_path / "rows.jsonl"), split="train[:2]")) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_has_a_train_split_only(streaming: bool, tmp_path: Path) -> None:
    write(Dataset.from_list(ROWS), tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl: there is no split 'test'; there is: train. A single file is a"):
        load_source(str(tmp_path / "rows.jsonl"), split="test", streaming=streaming)


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(Dataset.from_list(ROWS), folder / "train.jsonl")
    write(Dataset.from_list(ROWS[:1]), folder / "test.jsonl")
    assert len(load_source(str(folder), split="test")) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no split 'other'; there is: train, test"):
        load_source(str(folder), split="other")


def test_files_of_a_builder(tmp_path: Path) -> None:
    write(Dataset.from_list(ROWS), tmp_path / "rows.jsonl")
    loaded: Any = load_source("json", split="train", data_files=str(tmp_path / "rows.jsonl"))
    assert len(loaded) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_were_saved(streaming: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(list(load_source(str(tmp_path / "one"), split="train", streaming=streaming))) == 4
    assert set(load_source(str(tmp_path / "two"), streaming=streaming)) == {"train", "test"}
    assert len(list(load_source(str(tmp_path / "two"), split="test", streaming=streaming))) == 1
    with pytest.raises(ValueError, match="there is no split 'valid'; there is: train, test"):
        load_source(str(tmp_path / "two"), split="valid", streaming=streaming)


def test_nothing_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no/such: no local file or folder .*Check the spelling"):
        load_source("no/such", split="train")
    with pytest.raises(FileNotFoundError, match=r"rows.jsonl: no local file or folder"):
        load_source(str(tmp_path / "rows.jsonl"), split="train")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match=r"files of type '.txt' are not read; give one of .json, .jsonl"):
        load_source(str(tmp_path / "rows.txt"))
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": [}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl: the data cannot be read"):
        load_source(str(tmp_path / "rows.jsonl"), split="train")
