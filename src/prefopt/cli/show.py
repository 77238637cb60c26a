"""``prefopt show RUN.yaml``: what the model sees of rows. Neither the model's weights nor a device are needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefopt.cli.errors import UserError, check_writable, users_mistakes, write_wanted
from prefopt.cli.own_parser import OwnParser
from prefopt.terminal import without_bars

__all__ = ["main"]

ABOUT = "Shows what the model sees of rows: their tokens, which of them are trained on, special tokens, cuts, images."
FIRST_ROWS = 3
"""Shown where none are named."""
CANNOT_BE_PREPARED = 1
"""Exit status where a row that was asked for would end a run."""


def make_parser() -> OwnParser:
    parser = OwnParser(
        "prefopt show",
        "prefopt show RUN.yaml [--rows ROWS] [--split SPLIT] [--ids] [--html FILE]\n"
        "                    [--option value ...]",
        ABOUT,
        "All else is as in prefopt train: the run file comes first, options of the command line win over it. "
        "Every option of a run: prefopt METHOD --help-all.",
    )
    parser.add_argument("--rows", help="the first three, or as in 0,5,10-20, or random:5, drawn with the run's seed")
    parser.add_argument("--split", help="the split to show (default: dataset_train_split)")
    parser.add_argument("--ids", action="store_true", help="token ids, too")
    parser.add_argument("--html", metavar="FILE", help="write a page, and print only what it holds")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Shows rows; returns the exit status: 1 where one of them cannot be prepared."""
    own, rest = make_parser().parse_known_args(arguments)
    check_writable("--html", own.html)
    from prefopt.cli.run_file import method_and_arguments

    with users_mistakes():
        method, options = method_and_arguments("show", rest)
        from prefopt.cli.names import check_given, check_names

        check_names(method, options, vars(own))
        check_given(options)
        with without_bars():
            shown = read(method, options, own)
    return write(shown, own)


def read(method: str, options: list[str], own: argparse.Namespace) -> dict[str, Any]:
    """The rows, and what there is to say about all of them."""
    from prefopt.cli import train
    from prefopt.inspection.preview.numbers import row_numbers
    from prefopt.inspection.preview.rows import preview_rows
    from prefopt.trainer.rows import prepare_options
    from prefopt.trainer.setup import load_config

    script, training, model, mixture, _ = train.make_parser(method).parse_args_and_config(
        options, return_remaining_strings=True
    )
    train.show_log()
    training.image_roots = training.image_roots or train.image_roots(script, mixture) or None
    training.model_init_kwargs = train.model_options(model, training)
    name = model.model_name_or_path
    processing_class = tokenizer_of_run(name, training)
    prepare = prepare_options(training, training.objective().branches, load_config(name, training))
    split = own.split or script.dataset_train_split
    dataset = load_split(script, mixture, split)
    count = len(dataset) if hasattr(dataset, "__len__") else None
    first = FIRST_ROWS if count is None else min(FIRST_ROWS, count)
    numbers = [*range(first)] if own.rows is None else row_numbers(own.rows, count, training.seed)
    previews = preview_rows(dataset, numbers, processing_class, prepare, name=split)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    of_rows = f"{len(previews)} of {'a stream of' if count is None else f'{count:,}'} rows"
    about = [
        f"{of_rows}, {split}, {method.upper()}",
        f"{name}: {described(tokenizer, processing_class)}",
        limits(prepare),
    ]
    return {"previews": previews, "about": about, "eos": tokenizer.eos_token, "split": split}


def tokenizer_of_run(name: str, training: Any) -> Any:
    """The tokenizer or processor of the model; an error of its files is the user's to mend."""
    from prefopt.trainer.setup import load_processing_class

    try:
        return load_processing_class(None, name, training)
    except OSError as error:
        raise UserError(f"model_name_or_path={name!r}: no tokenizer or processor can be loaded. {error}") from error


def load_split(script: Any, mixture: Any, split: str) -> Any:
    """The rows of a split, or of the evaluation set that a mixture splits off."""
    from prefopt.cli.train import load_data

    if split == script.dataset_train_split:
        return load_data(script, mixture, with_eval=False)[0]
    return load_data(replace(script, dataset_test_split=split), mixture, with_eval=True)[1]


def described(tokenizer: Any, processing_class: Any) -> str:
    """A tokenizer with its special tokens, and whether it, or the processor that holds it, has a chat template."""
    tokens = [f"{name} {getattr(tokenizer, f'{name}_token') or 'none'}" for name in ("bos", "eos", "pad")]
    has_template = tokenizer.chat_template or processing_class.chat_template
    template = "a chat template" if has_template else "no chat template"
    return f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens ({', '.join(tokens)}; {template})"


def limits(options: Any) -> str:
    """What is cut, in words."""
    longest = "no limit" if options.max_length is None else f"at most {options.max_length:,} tokens"
    if options.max_completion_length is None:
        return f"prompt and completion: {longest}, {options.truncation_mode}"
    return f"prompt: {longest}, {options.truncation_mode}; completion: at most {options.max_completion_length:,} tokens"


def write(shown: dict[str, Any], own: argparse.Namespace) -> int:
    """To the terminal, or as a page."""
    from rich.console import Console
    from rich.text import Text

    from prefopt.data.report import named
    from prefopt.inspection.preview.facts import notes_of
    from prefopt.inspection.preview.terminal import legend, row_text
    from prefopt.terminal import harmless

    # Text goes out as it is: no wrapping, and nothing in it is markup or a number to be coloured
    console = Console(soft_wrap=True, highlight=False)
    previews = shown["previews"]
    for line in shown["about"]:
        console.print(Text(harmless(line)))
    if own.html:
        rows_of_note: dict[str, list[int]] = {}
        for preview in previews:
            for note in notes_of(preview):
                rows_of_note.setdefault(note, []).append(preview.row)
        for note, rows in rows_of_note.items():
            console.print(Text(harmless(f"{named(rows)}: {note}")))
        write_page(shown, own.html)
        console.print(Text(harmless(f"written: {own.html}")))
    else:
        console.print(legend())
        for preview in previews:
            console.print(row_text(preview, shown["eos"], with_ids=own.ids), end="")
    return CANNOT_BE_PREPARED if any(preview.problem for preview in previews) else 0


def write_page(shown: dict[str, Any], path: str) -> None:
    """Raises UserError where the file cannot be written."""
    from prefopt.inspection.preview.page import preview_page

    page = preview_page(shown["previews"], f"Rows of {shown['split']}", "; ".join(shown["about"]), shown["eos"])
    write_wanted("--html", path, page)
