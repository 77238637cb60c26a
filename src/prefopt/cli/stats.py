"""``prefopt stats``: what is in a data set, in the terminal, as a page, as a file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import check_writable, users_mistakes, write_wanted
from prefopt.cli.own_parser import OwnParser
from prefopt.cli.usage import METHODS
from prefopt.terminal import without_bars

if TYPE_CHECKING:
    from prefopt.inspection.statistics import Statistics

__all__ = ["main"]

USAGE = """\
usage: prefopt stats DATA|RUN.yaml [--model_name_or_path MODEL]
                     [--option value ...]

What is in a data set: lengths, duplicates, rows that teach nothing, bias to
length, what is cut, what is saved.

  DATA                  a file (JSON, JSONL, Parquet, CSV, Arrow), a folder, or
                        a Hub name
  RUN.yaml              a run file: its data, model and max_length

  --model_name_or_path MODEL
                        count tokens as this model's runs would; its weights
                        are not loaded
  --max_length 1024     limit whose cuts are counted, beside 512, 1024, 2048,
                        4096 and the model's context
  --mapping FILE.yaml   `columns:` and `messages:`, as an entry of `datasets:`
                        has them (docs/data.md)
  --method dpo          or cpo, or tpo, whose rows have a gold completion; a run
                        file names its own
  --max_rows 100000     of a larger set that many rows are read, evenly spaced;
                        of a stream the first
  --html FILE           a page with plots, whole in one file
  --json FILE           everything that was found, with all row numbers

Any option of a run is taken: --dataset_config, --dataset_train_split train,
--dataset_streaming, ...; every option: prefopt METHOD --help-all.
Status 0: every row can be read; 1: some cannot; 2: the command or the data set
is wrong.
"""
MAX_LENGTHS = (512, 1024, 2048, 4096)
MAX_ROWS = 100_000


def main(arguments: Sequence[str]) -> int:
    """Prints what is in a data set; returns 1 where rows of it cannot be read."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    own, rest = options().parse_known_args(arguments)
    for name in ("html", "json"):
        check_writable(f"--{name}", getattr(own, name))
    with users_mistakes():
        found = statistics(own, rest)
        show(found, own)
    return 1 if found.broken or not found.preparation.num_kept else 0


def options() -> OwnParser:
    parser = OwnParser(prog="prefopt stats", add_help=False)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--mapping")
    parser.add_argument("--max_rows", type=int, default=MAX_ROWS)
    parser.add_argument("--html")
    parser.add_argument("--json")
    return parser


def run_arguments(own: argparse.Namespace, rest: Sequence[str]) -> tuple[str, list[str]]:
    """The method, and the arguments that ``prefopt METHOD`` would be given for the same data.

    Raises:
        ValueError: no data is named, or the method twice.
    """
    from prefopt.cli.run_file import method_and_arguments

    if not rest or rest[0].startswith("-"):
        raise ValueError("prefopt stats wants the data first: prefopt stats DATA --option value")
    if own.max_rows < 1:
        raise ValueError(f"--max_rows {own.max_rows}: at least one row has to be read")
    if not rest[0].endswith((".yaml", ".yml")):
        return own.method or "dpo", ["--dataset_name", *rest]
    for name in ("method", "mapping"):
        if getattr(own, name) is not None:
            raise ValueError(f"--{name} goes with a data set; of a run it stands in {rest[0]}")
    return method_and_arguments("stats", rest)


def statistics(own: argparse.Namespace, rest: Sequence[str]) -> Statistics:
    """What is in the data set that the arguments name."""
    from prefopt.cli.names import check_names

    method, arguments = run_arguments(own, rest)
    check_names(method, arguments, vars(own))

    from prefopt.cli.train import image_roots, load_data, make_parser, model_options
    from prefopt.inspection.statistics import measure
    from prefopt.inspection.statistics.tokens import counter_of_run

    with quiet():
        script, training, model, mixture, _ = make_parser(method).parse_args_and_config(
            arguments, return_remaining_strings=True
        )
    if own.mapping is not None:
        mixture = mapped(own.mapping, script)
        script.dataset_name = None
    with without_bars():
        dataset, _ = load_data(script, mixture, with_eval=False)
    counter, meanings = None, {}
    if model.model_name_or_path is not None:
        training.image_roots = training.image_roots or image_roots(script, mixture) or None
        training.model_init_kwargs = model_options(model, training)
        counter, meanings = counter_of_run(model.model_name_or_path, training, MAX_LENGTHS)
    with shown_progress(min(own.max_rows, number_of_rows(dataset))) as progress:
        return measure(
            dataset,
            training.objective().branches,
            name=", ".join(config.path for config in mixture.datasets) or str(script.dataset_name),
            counter=counter,
            meanings=meanings,
            model=model.model_name_or_path or "",
            pairs_per_batch=training.per_device_train_batch_size,
            max_rows=own.max_rows,
            progress=progress,
        )


def mapped(path: str, script: Any) -> Any:
    """The data set as a mixture of one, with the columns and messages that a file maps.

    Raises:
        ValueError: the file has other entries.
        FileNotFoundError: there is no such file.
    """
    from prefopt.cli.run_file import read_yaml
    from prefopt.data import DatasetConfig, DatasetMixtureConfig

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; --mapping wants the path of a YAML file")
    entries, _ = read_yaml(path)
    if unknown := sorted(entries.keys() - {"columns", "messages"}):
        raise ValueError(f"{path}: unknown entry {unknown[0]!r}; a mapping has columns and messages")
    source = DatasetConfig(script.dataset_name, script.dataset_config, split=script.dataset_train_split, **entries)
    return DatasetMixtureConfig([source], streaming=script.dataset_streaming)


def number_of_rows(dataset: Any) -> int:
    """Rows of the set; of a stream, more than anybody reads."""
    return len(dataset) if hasattr(dataset, "__len__") else sys.maxsize


@contextmanager
def quiet() -> Iterator[None]:
    """Without what a config says of a run, as there will be none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def shown_progress(num_rows: int) -> Iterator[Any]:
    """A bar on the terminal, gone when it is full; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=num_rows)
        yield lambda done: bar.update(task, completed=done)


def show(found: Statistics, own: argparse.Namespace) -> None:
    """Prints what was found, and writes the files that were asked for."""
    from rich.console import Console

    from prefopt.inspection.statistics.terminal import print_statistics

    print_statistics(found, Console())
    for option, path, text in written(found, own):
        write_wanted(option, path, text)
        print(f"written: {path}")


def written(found: Statistics, own: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Option, path and content of each file."""
    if own.json is not None:
        import json
        from dataclasses import asdict

        yield "--json", own.json, json.dumps(asdict(found), indent=1, allow_nan=False)
    if own.html is not None:
        from prefopt.inspection.statistics.page import page

        yield "--html", own.html, page(found)
