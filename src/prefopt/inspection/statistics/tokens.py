"""Rows as the tokens that a run would train on: uncut, and as several limits would cut them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prefopt.data.encode import RowEncoder, unforeseen
from prefopt.data.rankings import filled_up
from prefopt.data.report import Status
from prefopt.inspection.statistics.result import CONTEXT, MAX_LENGTH
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.rows import prepare_options
from prefopt.trainer.setup import load_config, load_processing_class
from prefopt.types import TokenizedExample

__all__ = ["RowTokens", "TokenCounter", "counter_of_run"]

NumberedRow = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Lengths of a row, in tokens.

    Args:
        row: its number.
        prompt, completions: before any cut; 0 where the text alone says that nothing is to be learned.
        status: at the run's limit, and then at each further one, a `Status`.
        cut_prompt, cut_starts, cut_completions: at the run's own limit; none where the row is left out.
    """

    row: int
    prompt: int
    completions: tuple[int, ...]
    status: tuple[int, ...]
    cut_prompt: int
    cut_starts: tuple[int, ...]
    cut_completions: tuple[int, ...]


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of rows by the encoder that prepares a run's.

    Args:
        encoder: the run's, with its ``max_length``.
        max_lengths: further limits.
    """

    encoder: RowEncoder
    max_lengths: tuple[int, ...]

    @cached_property
    def limited(self) -> tuple[RowEncoder, ...]:
        """The run's encoder, and one for each of ``max_lengths``."""
        return (self.encoder, *(replace(self.encoder, max_length=limit) for limit in self.max_lengths))

    def __call__(self, rows: Sequence[NumberedRow]) -> list[RowTokens | ValueError]:
        """The lengths of each row, or what is wrong with it."""
        try:
            tokenized = self.encoder.tokenized([row for _, row in rows], [number for number, _ in rows])
        except Exception as error:  # a row's own, or a library's about one of them
            if len(rows) > 1:
                return [found for row in rows for found in self([row])]
            return [error if isinstance(error, ValueError) else unforeseen(rows[0][1], rows[0][0], error)]
        return [self.measured(*item) for item in tokenized]

    def measured(self, example: TokenizedExample, status: Status) -> RowTokens:
        fitted = [encoder.fit(example, status) for encoder in self.limited]
        cut = filled_up(fitted[0][0], self.encoder.branches)
        return RowTokens(
            row=example.row,
            prompt=len(example.prompt_ids),
            completions=tuple(map(len, example.completion_ids.values())),
            status=tuple(int(found) for _, found in fitted),
            cut_prompt=len(cut.prompt_ids),
            cut_starts=tuple(cut.prompt_starts.get(branch, 0) for branch in cut.completion_ids),
            cut_completions=tuple(map(len, cut.completion_ids.values())),
        )


def counter_of_run(
    model: str, training: PreferenceConfig, max_lengths: Sequence[int]
) -> tuple[TokenCounter, dict[int, str]]:
    """What counts tokens as a run would make them, and the meaning of the limits that are the run's or the model's.

    Args:
        model: a folder or a name on the Hub; its weights are not loaded.
        training: the config of the run.
        max_lengths: further limits.
    """
    config = load_config(model, training)
    options = prepare_options(training, training.objective().branches, config)
    encoder = RowEncoder(
        load_processing_class(None, model, training),
        options.branches,
        options.max_length,
        options.truncation_mode,
        "train",
        max_completion_length=options.max_completion_length,
        image_roots=options.image_roots,
    )
    context = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    named = ((options.max_length, MAX_LENGTH), (context, CONTEXT))
    meanings = {one: ", ".join(name for limit, name in named if limit == one) for one, _ in named if one is not None}
    limits = {*max_lengths, *meanings} - {options.max_length}
    return TokenCounter(encoder, tuple(sorted(limits))), meanings
