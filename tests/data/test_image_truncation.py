"""max_length and images: no image token is ever cut, in either mode."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from batching.tiny_processors import image, processor, row
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.data.images import image_token_ids
from prefopt.data.truncate import can_stay_whole, truncate
from prefopt.types import PAIR, TokenizedExample

Mode = Literal["keep_start", "keep_end"]
MODES: list[Mode] = ["keep_start", "keep_end"]
IMAGE = 1000


@st.composite
def with_stretches(draw: st.DrawFn) -> tuple[TokenizedExample, dict[Any, tuple[int, int]]]:
    """A prompt with an image or none, then completions with or without one, each token another number."""
    lengths = {part: draw(st.integers(1, 8)) for part in ("prompt", *PAIR)}
    images = {part: draw(st.booleans()) and draw(st.integers(0, length - 1)) for part, length in lengths.items()}
    ids: dict[Any, list[int]] = {}
    for number, (part, length) in enumerate(lengths.items()):
        ids[part] = [100 * number + place for place in range(length)]
        if images[part] is not False:
            ids[part][images[part] : images[part] + 1] = [IMAGE + 10 * number, IMAGE + 10 * number + 1]
    prompt = ids.pop("prompt")
    masks: dict[Any, list[bool]] = {branch: [token < IMAGE for token in tokens] for branch, tokens in ids.items()}
    stretches = {}
    for branch, tokens in ids.items():
        places = [place for place, token in enumerate(prompt + tokens) if token >= IMAGE]
        stretches |= {branch: (places[0], places[-1] + 1)} if places else {}
    return TokenizedExample(0, prompt, ids, masks), stretches


@settings(max_examples=200)
@given(with_stretches(), st.integers(1, 16), st.sampled_from(MODES))
def test_images_stay_whole_and_as_much_text_as_fits(made: Any, max_length: int, mode: Mode) -> None:
    example, stretches = made
    fits = {branch: can_stay_whole(own, max_length, mode) for branch, own in stretches.items()}
    cut = truncate(example, max_length, mode, stretches)
    for branch, ids in example.completion_ids.items():
        whole = [*example.prompt_ids, *ids]
        kept = [*cut.prompt_ids[cut.prompt_starts.get(branch, 0) :], *cut.completion_ids[branch]]
        assert [token < IMAGE for token in cut.completion_ids[branch]] == cut.loss_masks[branch]
        begin = min(stretches.get(branch, (len(whole),))[0], len(whole) - max_length) if mode == "keep_end" else 0
        if not fits.get(branch, True) or len(example.prompt_ids) - max(begin, 0) >= max_length:
            continue  # the row is skipped: its images or its prompt leave no room for a completion
        start = whole.index(kept[0])
        assert kept == whole[start : start + len(kept)]
        assert len(kept) == min(max_length, len(whole))
        assert [token for token in kept if token >= IMAGE] == [token for token in whole if token >= IMAGE]
        latest = len(whole) - len(kept) if mode == "keep_end" else 0
        assert start == min([latest, *(stretches[branch][:1] if branch in stretches else ())])


@settings(max_examples=200)
@given(with_stretches(), st.integers(1, 16), st.sampled_from(MODES))
def test_what_cannot_stay_whole_has_no_room(made: Any, max_length: int, mode: Mode) -> None:
    """In ``keep_start`` the images reach beyond the limit; in ``keep_end`` they alone are longer than it."""
    _, stretches = made
    for begin, end in stretches.values():
        too_long = end > max_length if mode == "keep_start" else end - begin > max_length
        assert can_stay_whole((begin, end), max_length, mode) != too_long
        assert can_stay_whole((begin, end), None, mode)


FAMILIES = ["llava", "qwen3_vl", "idefics3", "gemma3"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_cut_around_their_images(family: str, mode: Mode) -> None:
    """At every limit: each kept row has all its image tokens and markers, and fits; the others are skipped."""
    made = processor(family)
    rows = [row([image(), image(30, 60)], "Which is it? " * 3, "The second, I think.", "No.")]
    dataset = Dataset.from_list(rows)
    [whole] = prepare_dataset(dataset, made, PrepareOptions(PAIR, None, mode), name="train")
    full = tokenized_example(whole, PAIR)
    images = image_token_ids(made)
    num_images = sum(token in images for token in full.prompt_ids)
    markers = {"qwen3_vl": ("<|vision_start|>", "<|vision_end|>"), "gemma3": ("<boi>", "<eoi>")}.get(family, ())
    longest = max(len(full.prompt_ids) + len(ids) for ids in full.completion_ids.values())
    first = next(place for place, token in enumerate(full.prompt_ids) if token in images)
    num_kept = 0
    for max_length in range(longest - 1, 1, -7):
        try:
            [cut] = prepare_dataset(dataset, made, PrepareOptions(PAIR, max_length, mode), name="train")
        except ValueError as error:
            assert "fit within max_length" in str(error) or "left within max_length" in str(error)  # noqa: PT017
            continue
        num_kept += 1
        example = tokenized_example(cut, PAIR)
        assert len(example.images["prompt"]) == 2
        for branch, ids in example.completion_ids.items():
            kept = [*example.prompt_ids[example.prompt_starts[branch] :], *ids]
            assert len(kept) <= max_length
            assert sum(token in images for token in kept) == num_images
            text = made.tokenizer.decode(kept)
            assert [text.count(marker) for marker in markers] == [2] * len(markers)
            if mode == "keep_start":
                assert kept == [*full.prompt_ids, *full.completion_ids[branch]][:max_length]
    assert num_kept > (first // 7 if mode == "keep_end" else 0)


def test_images_that_do_not_fit_are_a_reason_of_their_own() -> None:
    made = processor("llava")
    rows = [row([image()] * 7, "Hm?"), row([], "Hm?", "Yes, yes.", "No, never."), row([image()], "A?", "B", "C")]
    for mode in MODES:
        kept = prepare_dataset(Dataset.from_list(rows), made, PrepareOptions(PAIR, 25, mode), name="train")
        skipped = prepare_report(kept).skipped
        assert skipped["images that do not fit within max_length"][0] == 0
    with pytest.raises(ValueError, match=r"1 x images that do not fit within max_length \(row 0\).*Raise max_length"):
        prepare_dataset(Dataset.from_list(rows[:1]), made, PrepareOptions(PAIR, 9, "keep_end"), name="train")
