"""Messages as chat templates take them, from messages as data sets store them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.errors import bad_row, described
from prefopt.types import Message

__all__ = ["is_blank", "parse_json", "parse_messages", "with_object_arguments", "without_none"]

_VISION = {"image", "image_url", "video", "audio"}


def parse_messages(value: Any, row: int, column: str) -> list[Message]:
    """A list of messages with every ``None`` taken out and text parts joined into one string.

    Arrow stores a key that one message has for all of them, as ``None``; templates ask whether a key is there.

    Raises:
        ValueError: an item is no message, or its content is neither text nor text parts.
    """
    return [_message(item, row, f"{column}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, row: int, column: str) -> Message:
    if not isinstance(item, Mapping):
        raise bad_row(row, column, f"expected a message, got {described(item)}", "Write {'role': .., 'content': ..}.")
    message = without_none(item)
    if not isinstance(message.get("role"), str):
        keys = ", ".join(sorted(item))
        fix = "Messages need 'role' and 'content'; other spellings are read with `messages:`, see docs/data.md."
        raise bad_row(row, column, f"the message has no 'role' (its keys: {keys})", fix)
    return {**message, "content": _content(message.get("content", ""), row, column)}


def _content(content: Any, row: int, column: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        fix = "The content of a message is text, or a list of parts {'type': 'text', 'text': ..}."
        raise bad_row(row, column, f"the content is {described(content)}", fix)
    for part in content:
        if part.get("type") in _VISION:
            fix = "Vision-language data is not supported yet: remove these parts or these rows."
            raise bad_row(row, column, f"the content has a part of type {part['type']!r}", fix)
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            fix = "Say how its parts are written with `messages: {parts: ..}`, see docs/data.md."
            raise bad_row(row, column, f"the content has a part that is no text: {described(part)}", fix)
    return "".join(part["text"] for part in content)


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
    return not any(message["content"].strip() or message.get("tool_calls") for message in said)


def parse_json(value: Any, row: int, column: str) -> Any:
    """A column that may be written as JSON text, as an object; ``None`` where it is empty."""
    if not isinstance(value, str):
        return without_none(value) or None
    try:
        return json.loads(value) or None if value.strip() else None
    except json.JSONDecodeError as error:
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
        except json.JSONDecodeError:
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
