"""A data set made of several, as the ``datasets:`` entry of a YAML file describes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets

from prefopt.data.mapping import from_entries, map_columns
from prefopt.data.sources import load_source

__all__ = ["DatasetConfig", "DatasetMixtureConfig", "get_dataset"]

logger = logging.getLogger(__name__)

_SPLIT_SEED = 42


@dataclass
class DatasetConfig:
    """One set of a mixture.

    Args:
        path: local file or folder, or a name on the Hub.
        name: configuration of a set on the Hub.
        data_dir: folder within ``path``.
        data_files: files within ``path``.
        split: which split is loaded.
        columns: names of the columns to keep; or new name -> where it comes from (docs/data.md).
        fraction: share of this set in the mixture, in relation to the fractions of the others.
        messages: how the set writes its messages, where not as ``role`` and ``content`` (docs/data.md).
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | dict[str, Any] | None = None
    fraction: float | None = None
    messages: dict[str, Any] | None = None


@dataclass
class DatasetMixtureConfig:
    """Several sets, one after another.

    Args:
        datasets: the sets, as :class:`DatasetConfig` or as mappings of its fields.
        streaming: read rows as they are needed.
        test_split_size: share (or number) of rows that become a ``test`` split; ``None``: no such split.
    """

    datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Sets of the mixture: path, split, columns, fraction, .. of each."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share (or number) of rows that become the test split."}
    )

    def __post_init__(self) -> None:
        for index, entry in enumerate(self.datasets):
            if isinstance(entry, dict):
                self.datasets[index] = from_entries(DatasetConfig, entry, f"datasets[{index}]")


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """The mixture: ``train``, and ``test`` where ``test_split_size`` is set.

    Fractions, given for all sets or for none, are made to sum to one; the mixture is as large as it can be with no
    row taken twice, and of each set the first rows are taken. The sets follow one another, unshuffled.

    Raises:
        ValueError: no sets; fractions on some sets only, not positive in sum, or with streaming; a test split with
            streaming; a set that cannot be loaded or whose columns do not fit those of the others.
    """
    configs = mixture_config.datasets
    if not configs:
        raise ValueError("datasets: the mixture is empty. Name at least one set, with its `path`.")
    loaded = [_load(config, mixture_config.streaming) for config in configs]
    fractions = [config.fraction for config in configs]
    if any(fraction is not None for fraction in fractions):
        loaded = _in_proportion(loaded, fractions, mixture_config.streaming)
    try:
        combined: Any = concatenate_datasets(loaded)
    except (ValueError, TypeError) as error:
        paths = ", ".join(config.path for config in configs)
        fix = "Give all sets the same columns of the same types, e.g. with `columns`."
        raise ValueError(f"datasets: the columns of {paths} do not fit together ({error}). {fix}") from error
    combined.info.dataset_name = ", ".join(dict.fromkeys(config.path for config in configs))
    if mixture_config.test_split_size is None:
        return DatasetDict({"train": combined})
    if isinstance(combined, IterableDataset):
        raise ValueError("test_split_size needs the number of rows, which a stream does not know. Unset one of them.")
    size = mixture_config.test_split_size
    size = int(size) if size >= 1 else size  # the command line makes every number a float; datasets wants whole rows
    logger.info("Splitting off a test set of size %s", size)
    return combined.train_test_split(test_size=size, seed=_SPLIT_SEED)


def _load(config: DatasetConfig, streaming: bool) -> Any:
    dataset: Any = load_source(
        config.path, config.name, config.split, streaming, data_dir=config.data_dir, data_files=config.data_files
    )
    try:
        if isinstance(config.columns, dict):
            return map_columns(dataset, config.columns, config.messages)
        if config.messages is not None:
            raise ValueError("`messages` says how to rewrite the columns that `columns` maps: name them there.")
        return dataset if config.columns is None else dataset.select_columns(config.columns)
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from error


def _in_proportion(loaded: Sequence[Dataset], fractions: Sequence[float | None], streaming: bool) -> list[Dataset]:
    """Of each set the first rows, as many as its fraction asks."""
    if streaming:
        raise ValueError("fraction: a stream does not know its number of rows. Leave `fraction` out, or `streaming`.")
    shares = [fraction for fraction in fractions if fraction is not None]
    if len(shares) < len(fractions):
        raise ValueError("fraction must be set for all sets of the mixture or for none of them.")
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"fraction: got {shares}; they must not be negative, and one must be positive.")
    weights = [share / sum(shares) for share in shares]
    total = min(len(dataset) / weight for dataset, weight in zip(loaded, weights, strict=True) if weight > 0)
    return [dataset.select(range(round(weight * total))) for dataset, weight in zip(loaded, weights, strict=True)]
