"""Both models over the rows: what they give the completions, how far they are apart, what they say themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

import prefopt
from prefopt.data import tokenized_example
from prefopt.data.prepare import PrepareOptions, prepare_dataset, prepare_report
from prefopt.inspection.comparing.kl import token_kl
from prefopt.inspection.comparing.statistics import Figure, Line, PairScores, check_finite, lines
from prefopt.terminal import only_errors
from prefopt.trainer.generation import generated_to_end
from prefopt.trainer.rows import prepare_options
from prefopt.trainer.setup import load_by_name, load_config, load_processing_class
from prefopt.types import PAIR, TokenizedExample

__all__ = ["Comparison", "Settings", "TokenKL", "compared"]


Said = tuple[list[int], bool]
"""Token ids without the end token, and whether it came."""


@dataclass(frozen=True)
class Settings:
    """How much of the data is looked at."""

    max_length: int | None = 1024
    """Tokens of prompt and completion."""
    batch_size: int = 8
    num_samples: int = 8
    """Prompts that both models complete, greedily."""
    max_new_tokens: int = 128
    num_kl_rows: int = 32
    """Pairs for which whole distributions are compared."""
    dtype: str = "float32"
    """Precision of the weights; nothing else is rounded."""


@dataclass(frozen=True)
class TokenKL:
    """KL(tuned || base) per token, nats: the mean over texts of the mean over a text's tokens."""

    texts: str
    """Of which: ``chosen``, ``rejected``, or what the tuned model says itself to the prompts: ``own text``."""
    figure: Figure
    num_texts: int
    num_tokens: int


@dataclass(frozen=True)
class SidedSample:
    """A prompt with the completions of its row and those of the two models."""

    row: int
    prompt: str
    chosen: str
    rejected: str
    base: str
    tuned: str
    num_tokens: tuple[int, int]
    """Of base and tuned, without the end token."""
    was_cut: tuple[bool, bool]
    """Whether a text was ended by ``max_new_tokens`` or the model's context, before the model ended it."""


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    base: str
    tuned: str
    settings: Settings
    num_rows: int
    """Rows of the data, those that were skipped included."""
    remarks: list[str]
    """About rows that were skipped or cut."""
    scores: PairScores
    lines: list[Line]
    kl: list[TokenKL]
    samples: list[SidedSample]
    texts: dict[int, tuple[str, str, str]]
    """Place of a pair among the scores -> prompt, chosen, rejected, for those whose text was wanted."""


def compared(
    base: str,
    tuned: str,
    dataset: Dataset,
    settings: Settings,
    shown: Callable[[PairScores], Sequence[int]],
    name: str = "test",
) -> Comparison:
    """The tuned model beside its base.

    Args:
        base: folder or Hub name, of a model or an adapter.
        tuned: the same.
        dataset: rows in any format that training takes.
        settings: how much of them is looked at.
        shown: `PairScores` -> places of the pairs whose text is wanted.
        name: of the split, in messages.

    Raises:
        ValueError: a model or a row cannot be used, the two models have different vocabularies, or a log-prob is not
            finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = scoring_trainer(base, tuned, dataset, settings, folder, name)
        check_vocabularies(base, tuned, trainer)
        rows = trainer.eval_dataset
        report = prepare_report(rows)
        scores = pair_scores(trainer, rows)
        check_finite(base, tuned, scores)
        examples = [tokenized_example(row, PAIR) for row in first(rows, settings.num_samples)]
        completions = both_completions(trainer, examples, settings) if examples else []
        return Comparison(
            base=base,
            tuned=tuned,
            settings=settings,
            num_rows=len(dataset),
            remarks=report.lines() + truncation(report.num_truncated, trainer.prepare_options.max_length),
            scores=scores,
            lines=lines(scores),
            kl=divergences(trainer, rows, examples, completions, settings),
            samples=sided_samples(trainer, examples, completions),
            texts={place: texts_of(trainer, rows[place]) for place in shown(scores)},
        )


def scoring_trainer(base: str, tuned: str, dataset: Dataset, settings: Settings, folder: str, name: str) -> Any:
    """DPO's trainer as the scorer of both: at beta = 1 a reward is the log-ratio of the two models."""
    args = prefopt.DPOConfig(
        folder,
        beta=1.0,
        max_length=settings.max_length,
        per_device_eval_batch_size=settings.batch_size,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": settings.dtype},
    )
    with only_errors("prefopt"):  # what is said of training: nothing is trained
        processing_class = load_processing_class(None, tuned, args)
        options: PrepareOptions = prepare_options(args, PAIR, load_config(tuned, args))
        rows: Any = prepare_dataset(dataset, processing_class, options, name=name)
        return prefopt.DPOTrainer(
            tuned, ref_model=base, args=args, train_dataset=rows, eval_dataset=rows, processing_class=processing_class
        )


def check_vocabularies(base: str, tuned: str, trainer: Any) -> None:
    """Raises: ValueError where a token is another text for each of the two models."""
    own, other = (
        getattr(each, "tokenizer", each) for each in (trainer.processing_class, load_by_name(base, trainer.args))
    )
    mine, theirs = own.get_vocab(), other.get_vocab()
    if any(theirs.get(token, index) != index for token, index in mine.items()):
        raise ValueError(
            f"{tuned} and {base} have different vocabularies, so that their log-probs are of different tokens; compare "
            "a model with the one that it was tuned from."
        )


def truncation(num_truncated: int, max_length: int | None) -> list[str]:
    if not num_truncated:
        return []
    return [f"{num_truncated} pairs were cut to max_length={max_length} tokens; both models saw the same cut."]


def pair_scores(trainer: Any, rows: Dataset) -> PairScores:
    """Log-probs of every pair under both models, in the layout that training would use."""
    found = trainer.predict(rows)
    pairs, lengths = found.predictions, found.label_ids
    return PairScores(
        rows=np.array(rows["row"]),
        base_chosen=pairs.logps_chosen - pairs.rewards_chosen,
        base_rejected=pairs.logps_rejected - pairs.rewards_rejected,
        tuned_chosen=pairs.logps_chosen,
        tuned_rejected=pairs.logps_rejected,
        tokens_chosen=lengths.chosen,
        tokens_rejected=lengths.rejected,
    )


def tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def both_completions(trainer: Any, examples: Sequence[TokenizedExample], settings: Settings) -> list[tuple[Said, Said]]:
    """What base and tuned say to each prompt: token ids, and whether the model has ended them."""
    trainer.place_reference()
    found = []
    with trainer.model_reference.active() as base:
        for model in (base, trainer.model):
            said: list[Said] = []
            for start in range(0, len(examples), settings.batch_size):
                part = examples[start : start + settings.batch_size]
                said += generated_to_end(model, part, tokenizer_of(trainer), settings.max_new_tokens, trainer.vision)
            found.append(said)
    return list(zip(*found, strict=True))


def divergences(
    trainer: Any,
    rows: Dataset,
    examples: Sequence[TokenizedExample],
    completions: Sequence[tuple[Said, Said]],
    settings: Settings,
) -> list[TokenKL]:
    """KL on the completions of the data, and on what the tuned model says itself."""
    data = [kl_of_row(trainer, row) for row in first(rows, settings.num_kl_rows)]
    said = zip(first(rows, len(examples)), completions, strict=True)
    own = [kl_of_row(trainer, with_completion(row, tuned)) for row, (_, (tuned, _)) in said if tuned]
    found = []
    for texts, values in (
        ("chosen", [chosen for chosen, _ in data]),
        ("rejected", [rejected for _, rejected in data]),
        ("own text", [chosen for chosen, _ in own]),
    ):
        if values:
            figure = Figure.mean(np.array([each.mean() for each in values]))
            found.append(TokenKL(texts, figure, len(values), sum(map(len, values))))
    return found


def first(rows: Dataset, number: int) -> list[Any]:
    """At most that many rows."""
    return rows.select(range(min(number, len(rows)))).to_list()


def with_completion(row: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The prepared row with ``ids`` in place of both completions."""
    new = {f"{branch}_{part}": value for branch in PAIR for part, value in (("ids", ids), ("mask", [True] * len(ids)))}
    return {name: value for name, value in row.items() if not name.endswith("_prompt_start")} | new


def kl_of_row(trainer: Any, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """[n] KL at each token of the chosen and of the rejected completion."""
    batch = trainer.collate(padded=True)([row], 1.0)
    with trainer.model_reference.active() as base:
        values = token_kl(trainer.model, base, batch).double().numpy()
    return values[batch.layout.token_slice("chosen")], values[batch.layout.token_slice("rejected")]


def sided_samples(
    trainer: Any, examples: Sequence[TokenizedExample], completions: Sequence[tuple[Said, Said]]
) -> list[SidedSample]:
    """The completions of both models as text, with the row's own."""

    def text(ids: Sequence[int]) -> str:
        return tokenizer_of(trainer).decode(list(ids), skip_special_tokens=True)

    return [
        SidedSample(
            example.row,
            text(example.prompt_ids),
            *(text(example.completion_ids[branch]) for branch in PAIR),
            *(text(ids) for ids, _ in (base, tuned)),
            num_tokens=(len(base[0]), len(tuned[0])),
            was_cut=(not base[1], not tuned[1]),
        )
        for example, (base, tuned) in zip(examples, completions, strict=True)
    ]


def texts_of(trainer: Any, row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a prepared row."""
    decode = tokenizer_of(trainer).decode
    prompt, chosen, rejected = (row[f"{part}_ids"] for part in ("prompt", *PAIR))
    return tuple(decode(ids, skip_special_tokens=True) for ids in (prompt, chosen, rejected))
