"""Data sets by name: local files, folders, and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    config,
    load_dataset,
    load_from_disk,
)

__all__ = ["load_source"]

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Loaded = Dataset | IterableDataset | DatasetDict | IterableDatasetDict


def load_source(
    path: str,
    name: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
) -> Loaded:
    """A data set by its path or name.

    Args:
        path: a JSON, JSONL, Parquet, CSV, TSV or Arrow file; a folder with such files, or one that ``save_to_disk``
            wrote; a name on the Hub; or a builder of ``datasets`` (``json``, ..) with ``data_files``.
        name: configuration of a set on the Hub.
        split: ``"train"``, ``"train[:100]"``, ..; ``None`` gives all splits.
        streaming: read rows as they are needed.
        data_dir: folder within ``path``.
        data_files: files within ``path``.

    Returns:
        One set where ``split`` is given, else a ``DatasetDict``.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: the split is not there, or a file cannot be read; what there is, is named.
    """
    place = Path(path).expanduser()
    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        return _named(_saved(place, split, streaming), path)
    if place.is_file():
        return _named(_file(place, split, streaming), path)
    arguments: dict[str, Any] = {"name": name, "data_dir": data_dir, "data_files": data_files, "streaming": streaming}
    loaded = _load(str(place) if place.is_dir() else path, split, arguments, path)
    return _named(loaded, data_files if isinstance(data_files, str) and path in _BUILDERS.values() else path)


def _named(loaded: Loaded, name: str) -> Loaded:
    """What was loaded, with the name that it was asked for by: `datasets` keeps that of its reader, or a part of it."""
    for dataset in loaded.values() if isinstance(loaded, dict) else [loaded]:
        dataset.info.dataset_name = name
    return loaded


def _file(place: Path, split: str | None, streaming: bool) -> Loaded:
    builder = _BUILDERS.get(place.suffix.lower())
    if builder is None:
        raise ValueError(f"{place}: files of type {place.suffix!r} are not read; give one of {', '.join(_BUILDERS)}.")
    arguments = {"data_files": str(place), "streaming": streaming}
    if place.suffix.lower() == ".tsv":
        arguments["sep"] = "\t"
    return _load(builder, split, arguments, str(place))


def _load(builder: str, split: str | None, arguments: dict[str, Any], path: str) -> Loaded:
    try:
        with _uncounted():
            return load_dataset(builder, split=split, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no local file or folder with data files has this name, and no data set on the Hub "
            f"({type(error).__name__}: {error}). Check the spelling, and the folder the command runs in."
        ) from None
    except ConnectionError as error:
        raise FileNotFoundError(
            f"{path}: no local file or folder has this name, and the Hub cannot be reached ({error}). "
            f"Check the spelling, and the folder the command runs in."
        ) from None
    except Exception as error:  # the readers of `datasets` raise many kinds, and wrap some
        splits = _splits(error)
        if splits is not None:
            raise missing_split(path, str(split), splits) from None
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):  # what the reader of JSON lets go where there is nothing
            raise ValueError(f"{path}: the data set is empty. Give one with at least one row.") from None
        raise ValueError(f"{path}: the data cannot be read ({type(cause).__name__}: {cause}).") from error


@contextmanager
def _uncounted() -> Iterator[None]:
    """Within it `datasets` does not tell its makers which reader is used, as it does for local files too."""
    before, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _splits(error: Exception) -> str | None:
    """The splits there are, as the message of ``datasets`` about a missing one names them."""
    _, found, rest = str(error).partition("Should be one of ")
    if found:
        return rest.rstrip(".").strip("[]").replace("'", "")
    _, found, rest = str(error).partition("Available splits: ")
    return rest.strip("[]").replace("'", "") if found else None


def missing_split(path: str, split: str, splits: str) -> ValueError:
    """The error for a split that is not there."""
    hint = ""
    if splits.strip() == "train":
        hint = " A single file is a train split: name another file for evaluation, or set `test_split_size`."
    return ValueError(f"{path}: there is no split {split!r}; there is: {splits}.{hint}")


def _saved(place: Path, split: str | None, streaming: bool) -> Loaded:
    """A folder that ``save_to_disk`` wrote."""
    loaded = load_from_disk(str(place))
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({str(loaded.split or "train"): loaded})
    if split is not None and split not in loaded:
        raise missing_split(str(place), split, ", ".join(map(str, loaded)))
    if streaming:
        loaded = IterableDatasetDict({key: dataset.to_iterable_dataset() for key, dataset in loaded.items()})
    return loaded if split is None else loaded[split]
