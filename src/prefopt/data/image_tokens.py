"""Where the tokens of images stand in a row's ids: what belongs to the prompt, and what must not be cut apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from prefopt.data.errors import bad_row
from prefopt.data.image_text import ImageReader, RowImage
from prefopt.types import Branch, TokenizedExample

__all__ = ["Span", "divided", "image_stretches"]

Span = tuple[int, int]
"""Where tokens begin and end."""


def divided(
    example: TokenizedExample, images: Mapping[Branch, Sequence[RowImage]], reader: ImageReader
) -> TokenizedExample:
    """The example with its images given to the prompt or to a branch, and no token of an image trained on.

    The prompt ends before the first image that the branches do not have in common: what follows belongs to the
    completions, and the part of it that was prompt is not trained on.

    Args:
        example: its ids hold the tokens of the images.
        images: branch -> the images of prompt and completion, in order.
        reader: of the processor that made the tokens.

    Raises:
        ValueError: the ids hold more or fewer image tokens than the images have; the row is named.
    """
    images = {branch: images.get(branch, []) for branch in example.completion_ids}
    sequences = [example.prompt_ids, *example.completion_ids.values()]
    if not any(images.values()) and all(map(reader.token_ids.isdisjoint, sequences)):
        return example
    spans: dict[Branch, list[Span]] = {
        branch: _spans(example, [*example.prompt_ids, *ids], images[branch], reader)
        for branch, ids in example.completion_ids.items()
    }
    end = _prompt_end(len(example.prompt_ids), spans, num_shared(images))
    back: Any = example.prompt_ids[end:]
    masks = {branch: [False] * len(back) + [*mask] for branch, mask in example.loss_masks.items()}
    for branch, own in spans.items():
        for start, stop in own:
            start, stop = max(start - end, 0), max(stop - end, 0)
            masks[branch][start:stop] = [False] * len(masks[branch][start:stop])
    first: Branch = next(branch for branch, own in spans.items() if own)
    of_prompt = [image for image, (start, _) in zip(images[first], spans[first], strict=True) if start < end]
    of_branches = {branch: own[len(of_prompt) :] for branch, own in images.items()}
    return replace(
        example,
        prompt_ids=example.prompt_ids[:end],
        completion_ids={branch: back + ids for branch, ids in example.completion_ids.items()},
        loss_masks=masks,
        images={part: own for part, own in {"prompt": of_prompt, **of_branches}.items() if own},
    )


def _prompt_end(end: int, spans: Mapping[Branch, Sequence[Span]], num_shared: int) -> int:
    """``end``, or earlier: before the first image that is not shared, and not within one."""
    end = min([end, *(own[num_shared][0] for own in spans.values() if len(own) > num_shared)])
    return min([end, *(start for own in spans.values() for start, stop in own if start < end < stop)])


def image_stretches(example: TokenizedExample, reader: ImageReader) -> dict[Branch, Span]:
    """Branch -> from where its first image begins to where its last one ends, counted from the prompt's first token.

    Special tokens on both sides of it are part of it: templates write markers around images.
    """
    stretches: dict[Branch, Span] = {}
    for branch, completion in example.completion_ids.items():
        ids = [*example.prompt_ids, *completion]
        own = [*example.images.get("prompt", ()), *example.images.get(branch, ())]
        if spans := _spans(example, ids, own, reader):
            start, end = enclosed((spans[0][0], spans[-1][1]), ids, reader.special_ids)
            stretches[branch] = (start, end)
    return stretches


def _spans(
    example: TokenizedExample, ids: Sequence[int], images: Sequence[RowImage], reader: ImageReader
) -> list[Span]:
    """Where the tokens of each image begin and end: its placeholders, and the markers around and in them."""
    places = [] if reader.token_ids.isdisjoint(ids) else [i for i, token in enumerate(ids) if token in reader.token_ids]
    ends = [0]
    for image in images:
        ends.append(ends[-1] + image.written.num_placeholders)
    if len(places) != ends[-1]:
        problem = f"{len(images)} images of {ends[-1]} tokens, but {len(places)} image tokens in prompt and completion"
        fix = f"Give every image one place ({reader.token!r} in a text), and check that the chat template writes it."
        raise bad_row(example.row, "images", problem, fix)
    return [
        (max(places[i] - image.written.num_before, 0), min(places[j - 1] + 1 + image.written.num_after, len(ids)))
        for image, (i, j) in zip(images, pairwise(ends), strict=True)
    ]


def enclosed(span: Span, ids: Sequence[int], special_ids: Collection[int]) -> Span:
    """``span`` with the special tokens that stand on both sides of it.

    >>> enclosed((2, 4), [5, 1, 9, 9, 2, 6], {1, 2, 9})
    (1, 5)
    >>> enclosed((2, 4), [5, 5, 9, 9, 2, 6], {1, 2, 9})
    (2, 4)
    """
    start, end = span
    if start > 0 and end < len(ids) and ids[start - 1] in special_ids and ids[end] in special_ids:
        return start - 1, end + 1
    return span


def num_shared(images: Mapping[Branch, Sequence[RowImage]]) -> int:
    """How many images, from the first on, all branches have in common."""
    columns = list(zip(*images.values(), strict=False))
    return next((i for i, column in enumerate(columns) if any(image != column[0] for image in column)), len(columns))
