"""Raw rows with images as text, for the collator: the data stage reads them, the model's chat template renders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prefopt.data.image_text import PictureReader
from prefopt.data.schema import parse_row
from prefopt.data.template import ChatRenderer, joined, prompt_rendering
from prefopt.types import PAIR, Branch, Message, PreferenceExample

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

__all__ = ["RenderedRow", "broken_row", "rendered_row", "shared_length"]

Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedRow:
    """A row as the processor takes it, with one image token for each image."""

    number: int
    """Place in the batch, from 0."""
    images: list[Any]
    prompt: str
    texts: Mapping[Branch, str]
    """branch -> prompt and completion together."""
    trained: Mapping[Branch, list[Span]]
    """branch -> where in its text the turns that are trained on begin and end."""


def broken_row(number: int, column: str, problem: str, fix: str) -> ValueError:
    return ValueError(f"row {number} of the batch, column {column!r}: {problem}. {fix}")


def shared_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """Number of leading items that all have in common.

    >>> shared_length("prompt: a", "prompt: b", "prompt")
    6
    """
    shortest = min(len(first), *map(len, others))
    return next((i for i in range(shortest) if any(other[i] != first[i] for other in others)), shortest)


def rendered_row(
    example: Mapping[str, Any], number: int, processor: ProcessorMixin, image_roots: tuple[str, ...]
) -> RenderedRow:
    """The row as text.

    Raises:
        ValueError: a column is missing or wrong, its images are not as many as its places for images, or not all of
            them are in the prompt.
    """
    for column in ("prompt", *PAIR):
        if example.get(column) is None or example[column] == []:
            fix = "Every row needs `prompt`, `chosen` and `rejected`; a prompt inside the completions is not split off."
            raise broken_row(number, column, f"it is missing (columns: {', '.join(example)})", fix)
    reader = PictureReader(processor, image_roots)
    columns = {name: value for name, value in example.items() if not name.endswith(("_ids", "_labels", "_logps"))}
    try:
        parsed = parse_row(columns, number, PAIR, reader)
        assert isinstance(parsed, PreferenceExample)
        row = _rendered(parsed, processor)
    except ValueError as error:
        message = str(error).replace(f"row {number},", f"row {number} of the batch,", 1)
        raise ValueError(message) from error.__cause__
    for column, text in {"prompt": row.prompt, **row.texts}.items():
        if text.count(reader.token) != len(row.images):
            problem = f"{len(row.images)} images, but {text.count(reader.token)} image tokens in its text"
            fix = "Give each image one place, all of them in the prompt, and check that the chat template writes them."
            raise broken_row(number, column, problem, fix)
    return row


def _rendered(example: PreferenceExample, processor: ProcessorMixin) -> RenderedRow:
    images, others = (list(example.images.get(branch, ())) for branch in PAIR)
    if list(map(id, images)) != list(map(id, others)):
        fix = "This collator takes images that both sides share; the trainers take others from the rows themselves."
        raise broken_row(example.row, "rejected_images", "the two sides have other images", fix)
    plain = replace(example, images={})  # they stay one token each: the processor expands them
    prompt: Any = example.prompt
    completions: Mapping[Branch, Any] = example.completions
    if not example.is_conversational:
        texts: dict[Branch, str] = {branch: prompt + completion for branch, completion in completions.items()}
        whole: dict[Branch, list[Span]] = {branch: [(len(prompt), len(text))] for branch, text in texts.items()}
        return RenderedRow(example.row, images, prompt, texts, whole)
    render = partial(ChatRenderer(processor).render, example=plain, column="prompt")
    chats: dict[Branch, tuple[list[Message], int]] = {
        branch: joined(prompt, completion) for branch, completion in completions.items()
    }
    opening = prompt_rendering(plain)
    alone = render(opening.messages, **opening.options)
    texts = {branch: render(chat) for branch, (chat, _) in chats.items()}
    text = alone[: shared_length(alone, *texts.values())]
    trained: dict[Branch, list[Span]] = {
        branch: _assistant_spans(render, chat, first, texts[branch], len(text))
        for branch, (chat, first) in chats.items()
    }
    return RenderedRow(example.row, images, text, texts, trained)


def _assistant_spans(
    render: Callable[..., str], chat: Sequence[Message], first: int, text: str, start: int
) -> list[Span]:
    """Where the assistant's turns from ``chat[first]`` on stand in ``text``; one span from ``start`` where unknown."""
    spans: list[Span] = []
    for index in range(first, len(chat)) if len(chat) - first > 1 else ():
        if chat[index]["role"] == "assistant":
            before, after = render(chat[:index], add_generation_prompt=True), render(chat[: index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                return [(start, len(text))]
            spans.append((len(before), len(after)))
    return spans or [(start, len(text))]
