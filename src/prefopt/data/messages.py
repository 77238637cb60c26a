"""Messages as chat templates take them, from messages as data sets store them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefopt.data.errors import bad_row, described
from prefopt.types import Message

__all__ = [
    "ReadImage",
    "follow_on",
    "is_blank",
    "no_processor",
    "parse_json",
    "parse_messages",
    "parts_of",
    "text_of",
    "with_object_arguments",
    "without_none",
]

ReadImage = Callable[[Any, int, str], Any]

_IMAGE_PARTS = ("image", "image_url")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


def parse_messages(value: Any, row: int, column: str, read_image: ReadImage | None = None) -> list[Message]:
    """A list of messages with every ``None`` taken out and text parts joined into one string.

    Arrow stores a key that one message has for all of them, as ``None``; templates ask whether a key is there.

    The content of a message with images is a list of parts, ``{"type": "text", "text": ..}`` and
    ``{"type": "image"}``, the latter with the image under ``image`` where the message holds it.

    Args:
        value: the messages.
        row, column: where they come from, for errors.
        read_image: called with an image, ``row`` and ``column``; ``None``: parts with images are refused.

    Raises:
        ValueError: an item is no message, or its content is neither text nor parts of text and images.
    """
    return [_message(item, row, f"{column}[{index}]", read_image) for index, item in enumerate(value)]


def _message(item: Any, row: int, column: str, read_image: ReadImage | None) -> Message:
    if not isinstance(item, Mapping):
        raise bad_row(row, column, f"expected a message, got {described(item)}", "Write {'role': .., 'content': ..}.")
    message = without_none(item)
    if not isinstance(message.get("role"), str):
        keys = ", ".join(sorted(map(str, item)))
        fix = "Messages need 'role' and 'content'; other spellings are read with `messages:`, see docs/data.md."
        raise bad_row(row, column, f"the message has no 'role' (its keys: {keys})", fix)
    return {**message, "content": _content(message.get("content", ""), row, column, read_image)}


def _content(content: Any, row: int, column: str, read_image: ReadImage | None) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        fix = "The content of a message is text, or a list of parts {'type': 'text', 'text': ..}."
        raise bad_row(row, column, f"the content is {described(content)}", fix)
    parts = [_part(part, row, column, read_image) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Mapping[str, Any], row: int, column: str, read_image: ReadImage | None) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _IMAGE_PARTS:
        if read_image is None:
            raise no_processor(row, column, f"the content has a part of type {kind!r}", "these parts")
        value = _own_image(part)
        return {"type": "image"} if value is None else {"type": "image", "image": read_image(value, row, column)}
    if kind in ("video", "audio"):
        fix = "Rows may hold text and images: remove these parts or these rows, or give frames of a video as images."
        raise bad_row(row, column, f"the content has a part of type {kind!r}", fix)
    if kind != "text" or not isinstance(part.get("text"), str):
        fix = "Say how its parts are written with `messages: {parts: ..}`, see docs/data.md."
        raise bad_row(row, column, f"the content has a part that is no text: {described(part)}", fix)
    return {"type": "text", "text": part["text"]}


def _own_image(part: Mapping[str, Any]) -> Any:
    """The image that a part holds, in any spelling; ``None`` where it marks the place of one."""
    for key in _IMAGE_KEYS:
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is None or (isinstance(value, Mapping | str) and not value):
            continue
        return f"data:;base64,{value}" if key == "base64" else value
    return None


def no_processor(row: int, column: str, problem: str, what: str) -> ValueError:
    """The error for images where there is a tokenizer alone."""
    fix = (
        "The tokenizer of a text model cannot take vision-related data: train a vision-language model, with its "
        "processor as `processing_class` (AutoProcessor.from_pretrained), or remove {} to train on the text alone."
    )
    return bad_row(row, column, problem, fix.format(what))


def parts_of(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The content of a message as parts.

    >>> parts_of("Hm.")
    [{'type': 'text', 'text': 'Hm.'}]
    """
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def follow_on(first: Any, second: Any) -> Any:
    """Two contents as one; text goes on where text stood.

    >>> follow_on("It is", [{"type": "text", "text": " a cat."}, {"type": "image"}])
    [{'type': 'text', 'text': 'It is a cat.'}, {'type': 'image'}]
    """
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    [*parts, last], [then, *others] = parts_of(first), parts_of(second)
    if last["type"] == then["type"] == "text":
        return [*parts, {"type": "text", "text": last["text"] + then["text"]}, *others]
    return [*parts, last, then, *others]


def without_none(value: Any) -> Any:
    """``value`` without the keys whose value is ``None``, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def is_blank(completion: str | Sequence[Message]) -> bool:
    """Whether a completion says nothing: no text but white space, and no tool call."""
    if isinstance(completion, str):
        return not completion.strip()
    said = [message for message in completion if message["role"] == "assistant"] or completion
    return not any(_says_something(message["content"]) or message.get("tool_calls") for message in said)


def _says_something(content: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is an image, or text that is more than white space."""
    return not isinstance(content, str) or bool(content.strip())


def parse_json(value: Any, row: int, column: str) -> Any:
    """A column that may be written as JSON text, as an object; ``None`` where it is empty."""
    if not isinstance(value, str):
        return without_none(value) or None
    try:
        return json.loads(value) or None if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        fix = "Write a list or an object, or JSON text of one."
        raise bad_row(row, column, f"the text is not JSON ({error})", fix) from None


def with_object_arguments(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the arguments of tool calls that are JSON text as objects; ``None`` where there are none."""
    found = False

    def call_with_object(call: Any) -> Any:
        nonlocal found
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            return call
        try:
            function = {**function, "arguments": json.loads(arguments)}
        except (json.JSONDecodeError, RecursionError):
            return call
        found = True
        return {**call, "function": function} if "function" in call else function

    changed = [
        {**message, "tool_calls": [call_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
    return changed if found else None
