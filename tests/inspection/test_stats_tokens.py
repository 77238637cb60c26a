"""Tokens, cuts and layouts as `measure` counts them: those of the rows and batches that a run makes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from encoder_decoders import ended_tokenizer
from tiny_models import conversational_rows, standard_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vision_models import PICTURES, processor_of

from prefopt import DPOConfig, TPOConfig
from prefopt.batching import pack_batch, pad_batch, share_batch
from prefopt.data import PrepareOptions, load_source, prepare_dataset, prepare_report, tokenized_example
from prefopt.data.encode import RowEncoder
from prefopt.data.report import SKIPPED, Status
from prefopt.inspection.statistics import Statistics, measure
from prefopt.inspection.statistics.tokens import TokenCounter, counter_of_run
from prefopt.quickstart import ASSETS
from prefopt.types import PAIR, TRIPLE, Branch

REWRITING = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' and not loop.last %}..{% else %}{{ message.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRUNCATIONS = ("keep_start", "keep_end")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(ASSETS)
    made.chat_template = REWRITING
    return made


def text_rows() -> Dataset:
    """Rows with every kind of dirt, and with tokens that merge across the end of the prompt ("e", "l": "el")."""
    rows = standard_rows(30, seed=3)
    dirt = [("say e", "l, no", "l, yes"), ("q", "same", "same"), ("q", "", "b"), ("q", "</s>", "b"), ("", "a", "b")]
    dirt += [("a prompt that is rather long for its answers", "yes", "no"), ("q", "a" * 40, "a" * 40 + "b")]
    for row in dirt:
        for column, value in zip(("prompt", "chosen", "rejected"), row, strict=True):
            rows[column].append(value)
    return Dataset.from_dict(rows)


def chat_rows() -> Dataset:
    rows = conversational_rows(10, seed=4)
    turn = {"role": "user", "content": "and then?"}
    for side in ("chosen", "rejected"):
        rows[side][3] = [*rows[side][3], turn, {"role": "assistant", "content": f"the {side} end"}]
    return Dataset.from_dict(rows)


def options_of(branches: tuple[Branch, ...], max_length: int | None, mode: str) -> PrepareOptions:
    return PrepareOptions(branches, max_length, mode)  # type: ignore[arg-type]


def measured(
    rows: Dataset, tokenizer: Any, max_length: int | None, mode: str, branches: Any = PAIR, **options: Any
) -> Statistics:
    encoder = RowEncoder(tokenizer, branches, max_length, mode, "train")  # type: ignore[arg-type]
    return measure(rows, branches, name="train", counter=TokenCounter(encoder, (12, 24)), **options)


@pytest.mark.parametrize("mode", TRUNCATIONS)
@pytest.mark.parametrize(
    ("make", "max_length"), [(text_rows, None), (text_rows, 30), (text_rows, 8), (chat_rows, None), (chat_rows, 40)]
)
def test_the_numbers_are_those_of_the_runs_report(
    make: Any, max_length: int | None, mode: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = make()
    found = measured(rows, tokenizer, max_length, mode).preparation
    report = prepare_report(prepare_dataset(rows, tokenizer, options_of(PAIR, max_length, mode), name="train"))
    assert found.skipped == {reason: tuple(numbers) for reason, numbers in report.skipped.items()}
    counts = (found.num_kept, len(found.truncated), len(found.merged), len(found.rewritten))
    assert counts == (report.num_kept, report.num_truncated, report.num_merged, report.num_rewritten)


def test_the_sets_of_these_tests_have_what_they_look_for(tokenizer: PreTrainedTokenizerBase) -> None:
    text = measured(text_rows(), tokenizer, 30, "keep_start").preparation
    assert (text.merged, text.skipped[SKIPPED[Status.EQUAL]]) == ((30,), (31,))
    assert text.skipped[SKIPPED[Status.EMPTY]] == (32, 33)
    assert {SKIPPED[Status.CUT_AWAY], SKIPPED[Status.EQUAL_WHEN_CUT]} <= text.skipped.keys()
    assert text.truncated
    assert measured(chat_rows(), tokenizer, None, "keep_start").preparation.rewritten == (3,)


@pytest.mark.parametrize("mode", TRUNCATIONS)
def test_every_limit_cuts_what_a_run_with_that_limit_cuts(mode: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = text_rows()
    whole = prepare_report(prepare_dataset(rows, tokenizer, options_of(PAIR, None, mode), name="train")).skipped
    left_out = {row for numbers in whole.values() for row in numbers}
    found = measured(rows, tokenizer, 30, mode).limits
    assert [limit.max_length for limit in found] == [12, 24, 30]
    for limit in found:
        report = prepare_report(
            prepare_dataset(rows, tokenizer, options_of(PAIR, limit.max_length, mode), name="train")
        )
        assert len(limit.truncated) == report.num_truncated
        assert {*limit.lost} == {row for numbers in report.skipped.values() for row in numbers} - left_out


def test_lengths_are_those_of_the_prepared_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = text_rows()
    prepared: Any = prepare_dataset(rows, tokenizer, options_of(PAIR, None, "keep_start"), name="train")
    kept = rows.select(prepared["row"])
    found = measured(kept, tokenizer, 8, "keep_start").lengths["tokens"]  # a cut changes no length
    for part, column in (("prompt", "prompt_ids"), ("chosen", "chosen_ids"), ("rejected", "rejected_ids")):
        lengths = [len(ids) for ids in prepared[column]]
        assert (found[part].mean, found[part].largest) == (sum(lengths) / len(lengths), max(lengths))


@pytest.mark.parametrize("mode", TRUNCATIONS)
@pytest.mark.parametrize("branches", [PAIR, TRIPLE])
def test_layouts_have_the_tokens_of_their_batches(branches: Any, mode: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_dict(standard_rows(20, seed=5, gold=True))
    prepared = prepare_dataset(rows, tokenizer, options_of(branches, 62, mode), name="train")
    examples = [tokenized_example(row, branches) for row in prepared]
    found = measured(rows, tokenizer, 62, mode, branches, pairs_per_batch=1).layouts
    assert found is not None

    def tokens(make: Any) -> int:
        return sum(make([example], branches).model_inputs["input_ids"].numel() for example in examples)

    assert (found.packed, found.shared_prompt) == (tokens(pack_batch), tokens(share_batch))
    assert found.padded == tokens(pad_batch)
    assert found.shared_prompt < found.packed < found.padded
    in_one = measured(rows, tokenizer, 62, mode, branches, pairs_per_batch=20).layouts
    assert in_one is not None
    assert in_one.padded == pad_batch(examples, branches).model_inputs["input_ids"].numel()


def test_a_bias_is_in_tokens_where_they_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """A completion of more characters may have fewer tokens."""
    few, many = " and and and and", " q x z Q!X!Z"
    assert len(few) > len(many)
    assert len(tokenizer(few).input_ids) < len(tokenizer(many).input_ids)
    rows = Dataset.from_list([{"prompt": "a", "chosen": few, "rejected": many}])
    by_characters = measure(rows, PAIR, name="train").bias
    by_tokens = measured(rows, tokenizer, None, "keep_start").bias
    assert by_characters is not None
    assert by_tokens is not None
    assert (by_characters.share_longer, by_tokens.share_longer) == (1.0, 0.0)


def test_rows_with_images_count_their_tokens() -> None:
    """As a run with a processor does: the tokens that stand for an image are counted, and cuts spare them."""
    made = processor_of("qwen2_vl")
    question = [{"role": "user", "content": "What is this?"}]
    answers = {side: [{"role": "assistant", "content": f"A {side} cat."}] for side in ("chosen", "rejected")}
    rows = Dataset.from_list([{"prompt": question, **answers, "images": [stored]} for stored in stored_pictures(4)])
    lengths = measured(rows, made, None, "keep_start").lengths
    longest = lengths["tokens"]["prompt"].largest
    assert longest > lengths["characters"]["prompt"].largest
    for limit in (None, longest + 4):
        found = measured(rows, made, limit, "keep_start")
        report = prepare_report(prepare_dataset(rows, made, options_of(PAIR, limit, "keep_start"), name="train"))
        assert (found.broken, found.with_images) == ((), (0, 1, 2, 3))
        assert found.preparation.num_kept == report.num_kept
        assert len(found.preparation.truncated) == report.num_truncated
        assert (report.num_truncated > 0) == (limit is not None)
    without = measured(rows, made.tokenizer, None, "keep_start")  # as a run without a processor says
    assert all("images" in row.message for row in without.broken)
    assert len(without.broken) == 4


def stored_pictures(count: int) -> list[dict[str, Any]]:
    """Images as data sets store them."""
    stored = []
    for number in range(count):
        buffer = BytesIO()
        PICTURES[number].save(buffer, format="PNG")
        stored.append({"bytes": buffer.getvalue(), "path": None})
    return stored


def test_an_encoder_decoder_has_its_own_limits_and_no_tokens_of_other_layouts() -> None:
    rows, tokenizer = Dataset.from_dict(standard_rows(12, seed=6)), ended_tokenizer()
    options = PrepareOptions(PAIR, 8, "keep_start", max_completion_length=5)
    encoder = RowEncoder(tokenizer, PAIR, 8, "keep_start", "train", max_completion_length=5)
    found = measure(rows, PAIR, name="train", counter=TokenCounter(encoder, ()))
    report = prepare_report(prepare_dataset(rows, tokenizer, options, name="train"))
    assert len(found.preparation.truncated) == report.num_truncated > 0
    assert found.layouts is None


def test_rows_that_cannot_be_tokenised_are_named() -> None:
    failing = AutoTokenizer.from_pretrained(ASSETS)
    failing.chat_template = "{{ raise_exception('no such role') if messages | length > 2 else messages[-1].content }}"
    found = measured(chat_rows(), failing, None, "keep_start")
    assert [row.row for row in found.broken] == [3]
    assert "no such role" in found.broken[0].message
    assert found.num_rows == 10


def test_the_counter_of_a_run_is_cut_at_its_models_context() -> None:
    config = DPOConfig("out", max_length=10_000, truncation_mode="keep_end", use_cpu=True, report_to="none")
    counter, meanings = counter_of_run(str(ASSETS), config, (64,))
    context = counter.encoder.max_length
    assert context is not None
    assert context < 10_000
    assert meanings == {context: "max_length, the model's context"}
    assert (counter.encoder.truncation_mode, counter.max_lengths, counter.encoder.branches) == ("keep_end", (64,), PAIR)
    triple, meanings = counter_of_run(str(ASSETS), TPOConfig("out", max_length=32, use_cpu=True, report_to="none"), ())
    assert triple.encoder.branches == TRIPLE
    assert meanings == {32: "max_length", context: "the model's context"}


# -- real data -----------------------------------------------------------------------------------------------------


def test_the_real_dirt_of_ultrafeedback_is_found_by_number(shared: Path) -> None:
    rows: Any = load_source(str(shared / "data" / "ultrafeedback" / "train_clean.jsonl"), split="train")
    found = measure(rows, PAIR, name="train")
    assert found.preparation.skipped == {
        "chosen equal to rejected": (306, 655, 910, 997),
        "empty completion": (478, 833),
    }
    for number in (306, 655, 910, 997):
        assert rows[number]["chosen"] == rows[number]["rejected"]
    assert not rows[478]["chosen"].strip() or not rows[478]["rejected"].strip()
    flipped: Any = load_source(str(shared / "data" / "ultrafeedback" / "label_flip_30.jsonl"), split="train")
    assert measure(flipped, PAIR, name="train").num_rows == 1000
