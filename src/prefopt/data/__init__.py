"""From rows in any accepted format to token ids."""

from prefopt.data.mixture import DatasetConfig, DatasetMixtureConfig, get_dataset
from prefopt.data.prepare import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.data.report import PrepareReport
from prefopt.data.schema import parse_row
from prefopt.data.sources import load_source

__all__ = [
    "DatasetConfig",
    "DatasetMixtureConfig",
    "PrepareOptions",
    "PrepareReport",
    "get_dataset",
    "load_source",
    "parse_row",
    "prepare_dataset",
    "prepare_report",
    "tokenized_example",
]
