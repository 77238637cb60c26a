"""Rows with images that TRL 1.16 refuses, or reads otherwise, and what prefopt makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batching.tiny_processors import image, processor, row
from datasets import Dataset

from prefopt.data import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.types import PAIR

pytestmark = pytest.mark.trl

PLACES = 4
"""Tokens of an image in these rows."""


def theirs(rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    return DataCollatorForVisionPreference(processor("llava"), **options)(rows)


def prepared(rows: list[dict[str, Any]], max_length: int | None = None, mode: Any = "keep_start") -> Dataset:
    options = PrepareOptions(PAIR, max_length, mode)
    found = prepare_dataset(Dataset.from_list(rows), processor("llava"), options, name="train")
    assert isinstance(found, Dataset)
    return found


def text_of(ids: Any) -> str:
    return processor("llava").tokenizer.decode(ids)


def test_tools_go_with_images() -> None:
    """TRL's collator takes the column and shows it to nobody."""
    tool = {"type": "function", "function": {"name": "zoom", "description": "Looks closer.", "parameters": {}}}
    rows = [row([image()], "What?") | {"tools": [tool]}]
    assert "zoom" in text_of(prepared(rows)[0]["prompt_ids"])
    assert "zoom" not in text_of(theirs(rows)["input_ids"][0])


def test_an_implicit_prompt_may_hold_images() -> None:
    explicit = row([image()], "What?")
    implicit = {side: explicit["prompt"] + explicit[side] for side in PAIR} | {"images": [image()]}
    assert prepared([implicit])[0]["prompt_ids"] == prepared([explicit])[0]["prompt_ids"]
    with pytest.raises(KeyError, match="prompt"):
        theirs([implicit])


def test_a_row_opens_no_file_elsewhere(tmp_path: Path) -> None:
    """TRL's collator opens whatever a row names, wherever it lies."""
    elsewhere = tmp_path / "private.png"
    image().save(elsewhere)
    rows = [row([image()], "What?") | {"images": [str(elsewhere)]}]
    assert len(theirs(rows)["pixel_values"])
    with pytest.raises(ValueError, match=r"row 0, column 'images': .*image_roots"):
        prepared(rows)


def test_text_with_images_ends_once() -> None:
    """Text rows end with EOS; TRL adds it where there are no images, and not where there are."""
    rows = [{"images": [image()], "prompt": "<image> What?", "chosen": " A.", "rejected": " B."}]
    assert text_of(prepared(rows)[0]["chosen_ids"]) == " A.</s>"
    assert not text_of(theirs(rows)["input_ids"][0]).endswith("</s>")


def test_max_length_cuts_no_image() -> None:
    """TRL cuts image tokens and keeps the pixels: the model then fails on their numbers."""
    rows = [row([image(), image()], "Hm?"), row([], "What?")]
    limit = 28
    batch = theirs([{**rows[0]}], max_length=10)
    token = processor("llava").image_token_id
    assert (batch["input_ids"] == token).sum(1).tolist() != [2 * PLACES] * 2
    assert len(batch["pixel_values"]) == 4
    for mode in ("keep_start", "keep_end"):
        for max_length in range(limit, 2 * limit):
            try:
                kept = prepared(rows, max_length, mode)
            except ValueError:  # no row fits
                continue
            counts = {found["row"]: found["prompt_ids"].count(token) for found in kept}
            assert counts.items() <= {0: 2 * PLACES, 1: 0}.items()
            skipped = [number for numbers in prepare_report(kept).skipped.values() for number in numbers]
            assert sorted([*counts, *skipped]) == [0, 1]


def test_the_sides_may_have_other_images() -> None:
    """The same words about another picture: TRL has no column for it."""
    rows = [row([image()], "What?", "A cat.", "A cat.") | {"rejected_images": [image(shade=30)]}]
    example = tokenized_example(prepared(rows)[0], PAIR)
    assert set(example.images) == set(PAIR)
    assert example.images["chosen"][0].tobytes() != example.images["rejected"][0].tobytes()
    chosen, rejected = theirs(rows)["pixel_values"]
    assert (chosen == rejected).all()
