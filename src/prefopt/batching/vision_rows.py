"""Raw rows with images as text: messages are read, their images found, and the chat template rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefopt.types import PAIR, Branch, Message

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


def rendered_row(example: Mapping[str, Any], number: int, processor: ProcessorMixin) -> RenderedRow:
    """The row as text.

    Raises:
        ValueError: a column is missing or wrong, or its images are not as many as its places for images.
    """
    for column in ("prompt", *PAIR):
        if example.get(column) is None:
            fix = "Every row needs `prompt`, `chosen` and `rejected`; a prompt inside the completions is not split off."
            raise broken_row(number, column, f"it is missing (columns: {', '.join(example)})", fix)
    images = _images(example)
    if all(isinstance(example[column], str) for column in ("prompt", *PAIR)):
        prompt: str = example["prompt"]
        texts: dict[Branch, str] = {branch: prompt + example[branch] for branch in PAIR}
        row = RenderedRow(number, images, prompt, texts, {b: [(len(prompt), len(texts[b]))] for b in PAIR})
    else:
        row = _rendered_messages(example, number, images, processor)
    token = getattr(processor, "image_token", None)
    for column, text in {"prompt": row.prompt, **row.texts}.items():
        if token is not None and text.count(token) != len(row.images):
            problem = f"{len(row.images)} images, but {text.count(token)} image tokens ({token!r}) in its text"
            raise broken_row(number, column, problem, "Give each image one place, and all of them in the prompt.")
    return row


def _images(example: Mapping[str, Any]) -> list[Any]:
    images = example.get("images") if example.get("images") is not None else example.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _rendered_messages(
    example: Mapping[str, Any], number: int, images: list[Any], processor: ProcessorMixin
) -> RenderedRow:
    prompt = _messages(example["prompt"], "user", number, "prompt")
    images = _placed(prompt, images, number)
    options = {"tools": _object(example, "tools", number), **(_object(example, "chat_template_kwargs", number) or {})}

    def render(messages: Sequence[Message], **more: Any) -> str:
        try:
            return processor.apply_chat_template(list(messages), tokenize=False, **options, **more)
        except Exception as error:  # a template may raise anything
            fix = "Change the row, the template, or `chat_template_kwargs`."
            raise broken_row(number, "prompt", f"the chat template failed: {error or type(error)}", fix) from error

    completions: dict[Branch, list[Message]] = {
        branch: _messages(example[branch], "assistant", number, branch) for branch in PAIR
    }
    chats: dict[Branch, list[Message]] = {
        branch: _joined(prompt, completion) for branch, completion in completions.items()
    }
    continued = all(len(chats[branch]) < len(prompt) + len(completions[branch]) for branch in PAIR)
    opened = not continued and any(completion[0]["role"] == "assistant" for completion in completions.values())
    alone = render(prompt, **({"continue_final_message": True} if continued else {"add_generation_prompt": opened}))
    texts: dict[Branch, str] = {branch: render(chat) for branch, chat in chats.items()}
    text = alone[: shared_length(alone, *texts.values())]
    trained: dict[Branch, list[Span]] = {
        branch: _assistant_spans(render, chat, len(chat) - len(completions[branch]), texts[branch], len(text))
        for branch, chat in chats.items()
    }
    return RenderedRow(number, images, text, texts, trained)


def _messages(value: Any, role: str, number: int, column: str) -> list[Message]:
    """Messages whose content is a list of parts, text or image; a text is one message of ``role``."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else _without_none(value)
    if not value or not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m for m in value):
        fix = "Write text, or messages {'role': .., 'content': ..}."
        raise broken_row(number, column, f"expected messages, got {type(value).__name__} {str(value)[:60]}", fix)
    for message in value:
        content = message.get("content", [])
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        message["content"] = content if isinstance(content, list) else [content]
        kinds = [part.get("type") if isinstance(part, dict) else part for part in message["content"]]
        if unknown := [kind for kind in kinds if kind != "text" and (kind != "image" or column != "prompt")]:
            fix = "A prompt may hold parts of type 'text' and 'image', a completion of type 'text'."
            raise broken_row(number, column, f"the content has a part of type {unknown[0]!r}", fix)
    return value


def _placed(messages: list[Message], images: list[Any], number: int) -> list[Any]:
    """All images of the messages in their order, after ``images`` have been put into the image parts without one."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    places = [part for part in parts if "image" not in part]
    if images and not places:
        places = [{"type": "image"} for _ in images]
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise broken_row(number, "prompt", "no user turn to put its images in", "Write one.")
        first["content"] = [*places, *first["content"]]
    if len(places) != len(images):
        problem = f"{len(images)} images for {len(places)} image parts"
        fix = "Give each image one part {'type': 'image'}, or leave all such parts out."
        raise broken_row(number, "prompt", problem, fix)
    for part, image in zip(places, images, strict=True):
        part["image"] = image
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def _joined(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """The conversation; a prompt that ends in an assistant turn is continued by a completion that begins with one."""
    last, first = prompt[-1], completion[0]
    if not last["role"] == first["role"] == "assistant" or last.get("tool_calls"):
        return [*prompt, *completion]
    text = "".join(part.get("text", "") for part in last["content"] + first["content"])
    others = [part for part in last["content"] if part["type"] != "text"]
    return [*prompt[:-1], {**last, **first, "content": [*others, {"type": "text", "text": text}]}, *completion[1:]]


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


def _object(example: Mapping[str, Any], column: str, number: int) -> Any:
    """A column that may be written as JSON text; None where it is empty, as templates take ``tools=[]`` for tools."""
    value = _without_none(example.get(column))
    try:
        return (json.loads(value) if isinstance(value, str) else value) or None
    except json.JSONDecodeError as error:
        fix = "Write an object, JSON text of one, or None."
        raise broken_row(number, column, f"the text is not JSON ({error})", fix) from None


def _without_none(value: Any) -> Any:
    """A copy without the keys whose value is None, which Arrow writes for those that other messages have."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
