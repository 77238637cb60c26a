"""What `show` says of single rows: cuts, rows that are left out or broken, images, encoder-decoders, numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from batching.tiny_processors import image, processor, row
from data.data_helpers import MARKED, PAIR_OPTIONS, assistant, byte_tokenizer, prepared, user
from datasets import Dataset
from encoder_decoders import ended_tokenizer

from prefopt.data import PrepareOptions
from prefopt.inspection.preview.facts import facts_of, first_token, notes_of, parts_of
from prefopt.inspection.preview.numbers import row_numbers
from prefopt.inspection.preview.rows import RowPreview, preview_rows

PLAIN = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No, no."}


def shown(rows: list[dict[str, Any]], tokenizer: Any = None, options: PrepareOptions = PAIR_OPTIONS) -> Any:
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    return preview_rows(Dataset.from_list(rows), range(len(rows)), tokenizer, options, name="train")


def texts(preview: RowPreview, branch: Any = "chosen") -> list[tuple[str, str]]:
    """Kind and text of the stretches of one sequence."""
    found: list[tuple[str, str]] = []
    sequences = preview.branches[branch]
    for piece in (*sequences.prompt, *sequences.completion):
        if found and found[-1][0] == piece.kind:
            found[-1] = (piece.kind, found[-1][1] + piece.text)
        else:
            found.append((piece.kind, piece.text))
    return found


def limited(length: int, mode: Any = "keep_start", **changes: Any) -> PrepareOptions:
    return replace(PAIR_OPTIONS, max_length=length, truncation_mode=mode, **changes)


def test_a_row_by_hand() -> None:
    [preview] = shown([PLAIN])
    assert texts(preview) == [("prompt", "Is it?"), ("trained", " Yes.</s>")]
    assert texts(preview, "rejected") == [("prompt", "Is it?"), ("trained", " No, no.</s>")]
    assert preview.branches["chosen"].completion[-1].special == "eos"


def test_only_the_assistant_is_trained_on() -> None:
    turns = [assistant("A."), user("And?"), assistant("B.")]
    rows = [{"prompt": [user("Hm?")], "chosen": turns, "rejected": [assistant("C.")]}]
    [preview] = shown(rows, byte_tokenizer(template=MARKED))
    assert texts(preview) == [
        ("prompt", "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\n"),
        ("trained", "A.<|im_end|>"),
        ("untrained", "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"),
        ("trained", "B.<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("mode", "chosen", "rejected"),
    [
        (
            "keep_start",
            [("prompt", "Is it?"), ("trained", " Yes"), ("cut", ".</s>")],
            [("prompt", "Is it?"), ("trained", " No,"), ("cut", " no.</s>")],
        ),
        (
            "keep_end",
            [("cut", "Is"), ("prompt", " it?"), ("trained", " Yes.</s>")],
            [("cut", "Is it"), ("prompt", "?"), ("trained", " No, no.</s>")],
        ),
    ],
)
def test_what_is_cut_is_shown_beside_what_is_kept(mode: str, chosen: Any, rejected: Any) -> None:
    [preview] = shown([PLAIN], options=limited(10, mode))
    assert texts(preview) == chosen
    assert texts(preview, "rejected") == rejected
    said = [(heading, said.split(";")[0]) for heading, _, said in parts_of(preview, None)]
    if mode == "keep_end":
        headings = ["prompt as chosen keeps it", "chosen", "prompt as rejected keeps it", "rejected"]
        assert [heading for heading, _ in said] == headings
        assert any("different parts of the prompt" in note for note in notes_of(preview))
    else:
        assert said == [("prompt", "6 tokens"), ("chosen", "4 tokens: 4 trained"), ("rejected", "4 tokens: 4 trained")]


def test_a_token_that_nothing_stands_before_is_not_trained_on() -> None:
    [preview] = shown([PLAIN], options=limited(3, "keep_end"))
    assert texts(preview) == [("cut", "Is it? Ye"), ("untrained", "s"), ("trained", ".</s>")]


def test_of_tokens_that_are_all_alike_the_last_ones_are_kept() -> None:
    """Where the ids do not tell which of them were cut, the side does."""
    rows = [{"prompt_ids": [5], "chosen_ids": [7] * 6, "rejected_ids": [8] * 6}]
    [preview] = shown(rows, options=limited(3, "keep_end"))
    kinds = [piece.kind for piece in preview.branches["chosen"].completion]
    assert kinds == ["cut"] * 3 + ["untrained"] + ["trained"] * 2
    [preview] = shown(rows, options=limited(3))
    kinds = [piece.kind for piece in preview.branches["chosen"].completion]
    assert kinds == ["trained"] * 2 + ["cut"] * 4


def test_a_completion_that_lost_its_end_is_told() -> None:
    """The end of its last turn, whatever the turns before end with; white space may follow EOS."""
    [cut], [whole] = shown([PLAIN], options=limited(10)), shown([PLAIN])
    assert parts_of(cut, "</s>")[1][2].endswith("; does not end with </s> (EOS)")
    assert not any("EOS" in said for _, _, said in parts_of(whole, "</s>"))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    rows = [{"prompt": [], "chosen": [user("a"), assistant("b"), user("c"), assistant("d")]}]
    rows[0]["rejected"] = [user("a"), assistant("e")]
    [whole], [cut] = shown(rows, tokenizer), shown(rows, tokenizer, limited(44))
    assert not any("EOS" in said for _, _, said in parts_of(whole, "<|im_end|>"))
    ends = {heading: "EOS" in said for heading, _, said in parts_of(cut, "<|im_end|>")}
    assert ends == {"prompt": False, "chosen": True, "rejected": False}


@pytest.mark.parametrize(
    ("row", "length", "reason", "has_tokens"),
    [
        ({**PLAIN, "chosen": ""}, None, "empty completion", False),
        ({**PLAIN, "chosen": " No, no."}, None, "chosen equal to rejected", False),
        (PLAIN, 5, "no completion token left within max_length", True),
        ({**PLAIN, "chosen": " No, yes."}, 9, "chosen equal to rejected within max_length", True),
    ],
)
def test_rows_that_are_left_out_say_why(row: Any, length: int | None, reason: str, has_tokens: bool) -> None:
    [preview] = shown([row], options=replace(PAIR_OPTIONS, max_length=length))
    assert preview.skipped == reason
    assert f"training leaves this row out: {reason}" in notes_of(preview)
    assert bool(preview.branches) == has_tokens
    assert preview.given == ({} if has_tokens else row)
    kinds = {kind for branch in preview.branches for kind, _ in texts(preview, branch)}
    assert "trained" not in kinds


def test_a_row_that_would_end_the_run_is_shown_with_the_message() -> None:
    strict = replace(PAIR_OPTIONS, on_bad_row="error")
    empty = {**PLAIN, "rejected": " "}
    assert shown([empty])[0].problem is None
    [refused] = shown([empty], options=strict)
    assert refused.problem is not None
    assert "train data, row 0: empty completion. Remove the row" in refused.problem
    [good, broken] = shown([PLAIN, {**PLAIN, "chosen": None}])
    assert good.problem is None
    assert broken.problem is not None
    assert broken.problem.startswith("train data, row 1, column 'chosen': the value is None.")
    assert broken.given["chosen"] == "None"


def test_a_wrong_column_and_a_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match="train data: no column 'chosen'"):
        shown([{"prompt": "a", "good": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"no row 7: the train data has 2 rows \(they are numbered from 0 to 1\)"):
        preview_rows(Dataset.from_list([PLAIN] * 2), [0, 7], byte_tokenizer(), PAIR_OPTIONS, name="train")
    stream = Dataset.from_list([PLAIN] * 2).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row 7: the train data has 2 rows"):
        preview_rows(stream, [0, 7], byte_tokenizer(), PAIR_OPTIONS, name="train")


def test_streams_and_prepared_sets_show_the_same() -> None:
    rows = [{**PLAIN, "chosen": f" Yes, {number}."} for number in range(5)]
    tokenizer, numbers = byte_tokenizer(), [3, 1, 3]
    expected = [shown(rows)[number] for number in (1, 3)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert preview_rows(stream, numbers, tokenizer, PAIR_OPTIONS, name="train") == expected
    assert preview_rows(prepared(rows, tokenizer), numbers, tokenizer, PAIR_OPTIONS, name="train") == expected


def test_numbers_of_a_row_are_shown() -> None:
    own = {"weight": 0.5, "margin": 2.0, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    [preview] = shown([{**PLAIN, **own}])
    assert (preview.weight, preview.target_margin) == (0.5, 2.0)
    assert preview.ref_sum_logps == {"chosen": -3.0, "rejected": -4.0}
    assert facts_of(preview) == "weight 0.5, margin 2, ref_chosen_logps -3, ref_rejected_logps -4"


def test_tokens_that_merge_across_the_prompts_end_are_told() -> None:
    """The prompt ends in "t", the completion begins with "he": one token stands for both, with the space before."""
    [preview] = shown([{"prompt": "Say t", "chosen": "he end", "rejected": "o me"}])
    assert preview.is_merged
    assert texts(preview) == [("prompt", "Say"), ("trained", " the end</s>")]
    assert first_token(preview.branches["chosen"].completion).startswith("' the' (id ")
    assert any("merge across the end of the prompt" in note for note in notes_of(preview))


def test_rankings_show_the_completions_that_they_have() -> None:
    options = replace(PAIR_OPTIONS, branches=("chosen", "rejected", "rank_3"))
    rows = [{"prompt": "a", "completions": [" b", " c", " d"]}, {"prompt": "a", "completions": [" b", " c"]}]
    three, two = shown(rows, options=options)
    assert [*three.branches] == ["chosen", "rejected", "rank_3"]
    assert [*two.branches] == ["chosen", "rejected"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_images_are_placeholders_with_their_size(name: str) -> None:
    made = processor(name)
    options = replace(PAIR_OPTIONS, max_length=None)
    [preview] = preview_rows(Dataset.from_list([row([image(40, 30)], "Light?")]), [0], made, options, name="train")
    assert preview.prompt_images == ((40, 30),)
    assert "images 40x30" in parts_of(preview, None)[0][2]
    placeholders = [piece for piece in preview.branches["chosen"].prompt if piece.is_image]
    assert {index for piece in placeholders for index in piece.ids} <= set(made.image_token_ids)
    [whole] = prepared([row([image(40, 30)], "Light?")], made)
    count = sum(index in made.image_token_ids for index in whole["prompt_ids"])
    assert sum(len(piece.ids) for piece in placeholders) == count
    labels = [piece.image_label for piece in placeholders]
    # Idefics3 cuts an image into tiles, and sees the whole beside them
    assert labels == (
        ["3 image tokens"] * 5 if name == "idefics3" else [f"image 40x30, {count} image token{'s' * (count > 1)}"]
    )


def test_an_encoder_and_a_decoder_read_sequences_of_their_own() -> None:
    options = limited(4, max_completion_length=3)
    rows = [{"prompt": "baba dada fafa gaga kaka", "chosen": "baba dada fafa", "rejected": "dada"}]
    [preview] = shown(rows, ended_tokenizer(with_bos=True), options)
    counts: dict[str, list[tuple[str, int]]] = {}
    for part in ("prompt", "completion"):
        pieces = getattr(preview.branches["chosen"], part)
        kinds = groupby(pieces, key=lambda piece: piece.kind)
        counts[part] = [(kind, sum(len(piece.ids) for piece in group)) for kind, group in kinds]
    # The prompt keeps BOS and EOS; the completion is cut at its end, and has no EOS then
    assert counts == {"prompt": [("prompt", 3), ("cut", 3), ("prompt", 1)], "completion": [("trained", 3), ("cut", 2)]}
    specials = [piece.special for piece in preview.branches["chosen"].prompt]
    assert specials == ["bos", *[""] * 5, "eos"]


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("0,5,10-12", [0, 5, 10, 11, 12]), (" 2 , 1-2", [1, 2]), ("random:0", [])]
)
def test_rows_are_named_by_number(text: str, numbers: list[int]) -> None:
    assert row_numbers(text, 20, seed=0) == numbers


def test_rows_are_drawn_with_the_seed() -> None:
    drawn = row_numbers("random:5", 1000, seed=1)
    assert len(set(drawn)) == 5
    assert drawn == row_numbers("random:5", 1000, seed=1)
    assert drawn != row_numbers("random:5", 1000, seed=2)
    assert row_numbers("random:9", 3, seed=1) == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1;2", "random:", "random:x", "0-1000000000000", "1.5"])
def test_what_is_no_row_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--rows"):
        row_numbers(text, 5, seed=0)


def test_rows_of_a_stream_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="the rows of a stream cannot be drawn"):
        row_numbers("random:2", None, seed=0)
