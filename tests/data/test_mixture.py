"""Mixtures of data sets, by TRL's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt.data import DatasetConfig, DatasetMixtureConfig, get_dataset


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files: ten rows "a0".. and four rows "b0".."""
    for letter, count in (("a", 10), ("b", 4)):
        rows = [{"prompt": "p", "chosen": f"{letter}{number}", "rejected": "r"} for number in range(count)]
        Dataset.from_list(rows).to_json(tmp_path / f"{letter}.jsonl")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def mixed(paths: list[str], fractions: Any = (None, None), **options: Any) -> DatasetDict:
    configs = [DatasetConfig(path, fraction=fraction) for path, fraction in zip(paths, fractions, strict=False)]
    return get_dataset(DatasetMixtureConfig(datasets=configs, **options))


def test_sets_follow_one_another(files: list[str]) -> None:
    sets = mixed(files)
    assert list(sets) == ["train"]
    assert sets["train"]["chosen"] == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)]


def test_streams(files: list[str]) -> None:
    train = mixed(files, streaming=True)["train"]
    assert isinstance(train, IterableDataset)
    assert len(list(train)) == 14


def test_fractions_take_the_first_rows_of_each(files: list[str]) -> None:
    """Weights 1/3 and 2/3; the second set's 4 rows are 2/3 of 6."""
    train = mixed(files, (0.5, 1.0))["train"]
    assert train["chosen"] == ["a0", "a1", "b0", "b1", "b2", "b3"]
    assert mixed(files, (1.0, 0.0))["train"]["chosen"] == [f"a{n}" for n in range(10)]


def test_a_test_split_is_the_same_every_time(files: list[str]) -> None:
    first, second = (mixed(files, test_split_size=0.5) for _ in range(2))
    assert (len(first["train"]), len(first["test"])) == (7, 7)
    assert first["test"]["chosen"] == second["test"]["chosen"], "every rank makes the split itself"


def test_columns_are_selected(files: list[str]) -> None:
    config = DatasetMixtureConfig(datasets=[DatasetConfig(files[0], columns=["chosen", "rejected"])])
    assert get_dataset(config)["train"].column_names == ["chosen", "rejected"]


def test_entries_of_a_yaml_file(files: list[str]) -> None:
    entries: Any = [{"path": files[0], "split": "train[:3]"}]
    assert len(get_dataset(DatasetMixtureConfig(datasets=entries))["train"]) == 3
    with pytest.raises(ValueError, match=r"datasets\[0\]: unknown entry 'pth'; known: path, .*Did you mean 'path'"):
        DatasetMixtureConfig(datasets=[{"pth": "x"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"datasets\[0\]: .*path"):
        DatasetMixtureConfig(datasets=[{"split": "x"}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": (0.5, None)}, "fraction must be set for all sets"),
        ({"fractions": (0.5, 0.5), "streaming": True}, "fraction: a stream does not know"),
        ({"fractions": (-1.0, 2.0)}, r"fraction: got \[-1.0, 2.0\]"),
        ({"fractions": (0.0, 0.0)}, "one must be positive"),
        ({"streaming": True, "test_split_size": 0.1}, "test_split_size needs the number of rows"),
    ],
)
def test_what_does_not_go_together(arguments: dict[str, Any], message: str, files: list[str]) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(files, **arguments)


def test_an_empty_mixture() -> None:
    with pytest.raises(ValueError, match="the mixture is empty"):
        get_dataset(DatasetMixtureConfig())


def test_columns_that_do_not_fit(files: list[str], tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": 3, "chosen": ["x"], "rejected": "r"}]).to_json(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match=r"the columns of .*a.jsonl, .*c.jsonl do not fit together"):
        mixed([files[0], str(tmp_path / "c.jsonl")])
    with pytest.raises(ValueError, match=r"a.jsonl: .*nope"):
        get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(files[0], columns=["nope"])]))
    with pytest.raises(ValueError, match=r"a.jsonl: `messages` says how"):
        get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(files[0], messages={"role_key": "from"})]))


@pytest.mark.trl
def test_fractions_are_trls(files: list[str]) -> None:
    trl = pytest.importorskip("trl.scripts.utils")
    for fractions in ((0.3, 0.7), (1.0, 1.0), (0.2, 0.1)):
        configs = [
            trl.DatasetConfig(path="json", data_files=path, fraction=fraction)
            for path, fraction in zip(files, fractions, strict=True)
        ]
        theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=configs))
        assert mixed(files, fractions)["train"]["chosen"] == theirs["train"]["chosen"]
