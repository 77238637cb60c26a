"""Other spellings of a data set: columns under other names, messages under other keys, sides made of parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from prefopt.data.errors import bad_row, described, nearest
from prefopt.data.images import undecoded
from prefopt.types import Message

__all__ = ["ColumnSource", "MessageFormat", "map_columns"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_PARTS = {"text": "content", "reasoning": "reasoning_content", "tool_call": "tool_calls"}


@dataclass(frozen=True)
class MessageFormat:
    """How a data set writes its messages: the ``messages:`` entry of a data set's config.

    Args:
        role_key: key of a message's role (ShareGPT: ``from``).
        content_key: key of what it says (ShareGPT: ``value``).
        roles: tag -> role, e.g. ``{human: user, gpt: assistant}``; roles under their own names need no entry.
        part_type_key, part_value_key: keys of a part, where what a message says is a list of parts.
        parts: type of a part -> where it goes: ``content`` (joined), ``tool_calls`` (a call, or JSON text of one),
            any other key (joined text); or a pattern with ``{}`` that is written into the content, such as
            ``"<think>{}</think>"``.
    """

    role_key: str = "role"
    content_key: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    part_type_key: str = "type"
    part_value_key: str = "value"
    parts: Mapping[str, str] = field(default_factory=lambda: dict(_PARTS))

    @property
    def keys(self) -> list[str]:
        """The keys of the messages that are made, beside role, content and tool_calls."""
        return sorted({place for place in self.parts.values() if "{}" not in place} - {"content", "tool_calls"})


@dataclass(frozen=True)
class ColumnSource:
    """Where a column comes from: another column, and of its messages' parts those of the types in ``keep``."""

    column: str
    keep: Sequence[str] | None = None


def map_columns(
    dataset: Dataset | IterableDataset,
    columns: Mapping[str, str | Mapping[str, Any]],
    messages: Mapping[str, Any] | None,
) -> Dataset | IterableDataset:
    """The data set with the columns that ``columns`` names, made from its own.

    Args:
        columns: new name -> name of a column, or ``{column: .., keep: [..]}``.
        messages: entries of :class:`MessageFormat`; given, columns of messages are rewritten as ``role`` and
            ``content``.

    Raises:
        ValueError: a source column is missing, an entry is unknown, or a message is not written as ``messages`` says.
    """
    sources = {name: _source(name, entry) for name, entry in columns.items()}
    message_format = None if messages is None else from_entries(MessageFormat, messages, "messages")
    dataset = undecoded(dataset)
    own = dataset.column_names or list(next(iter(dataset), {}))
    for name, source in sources.items():
        if own and source.column not in own:
            hint = nearest(source.column, own)
            raise ValueError(
                f"columns: {name} is to come from {source.column!r}, which the data set does not have "
                f"(columns: {', '.join(own)}).{hint}"
            )
        if source.keep is not None and message_format is None:
            raise ValueError(f"columns: {name} keeps parts of messages, so that `messages:` must say how they look.")
    return dataset.map(
        convert_row,
        with_indices=True,
        remove_columns=own,
        features=_features(dataset.features, sources, message_format),
        fn_kwargs={"sources": sources, "message_format": message_format},
    )


def _source(name: str, entry: str | Mapping[str, Any]) -> ColumnSource:
    return ColumnSource(entry) if isinstance(entry, str) else from_entries(ColumnSource, entry, f"columns: {name}")


def from_entries(kind: type, entries: Mapping[str, Any], where: str) -> Any:
    """The dataclass ``kind`` from the entries of a YAML mapping; unknown ones are errors."""
    known = [item.name for item in fields(kind)]
    for key in entries:
        if key not in known:
            raise ValueError(f"{where}: unknown entry {key!r}; known: {', '.join(known)}.{nearest(key, known)}")
    try:
        return kind(**entries)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _features(
    features: Features | None, sources: Mapping[str, ColumnSource], message_format: MessageFormat | None
) -> Features | None:
    """Types of the new columns: messages have one fixed set of keys, so that every row fits every other."""
    if features is None:
        return None
    call = {"type": Value("string"), "function": {"name": Value("string"), "arguments": Value("string")}}
    keys = {} if message_format is None else {key: Value("string") for key in message_format.keys}
    message = {"role": Value("string"), "content": Value("string"), **keys, "tool_calls": List(call)}

    def feature(source: ColumnSource) -> Any:
        own: Any = features[source.column]
        inner = own.feature if isinstance(own, List) else own
        is_messages = message_format is not None and isinstance(inner, dict)
        return List(message) if is_messages else own

    return Features({name: feature(source) for name, source in sources.items()})


def convert_row(
    row: Mapping[str, Any], row_number: int, sources: Mapping[str, ColumnSource], message_format: MessageFormat | None
) -> dict[str, Any]:
    """One row under its new names."""
    converted = {}
    for name, source in sources.items():
        value = row.get(source.column)
        if message_format is not None and isinstance(value, Mapping):
            value = [value]
        if message_format is not None and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = [_message(item, source, message_format, row_number) for item in value]
        converted[name] = value
    return converted


def _message(item: Any, source: ColumnSource, message_format: MessageFormat, row_number: int) -> Message:
    for key in (message_format.role_key, message_format.content_key):
        if not isinstance(item, Mapping) or item.get(key) is None:
            fix = "Say under `messages:` what role_key and content_key are."
            raise bad_row(row_number, source.column, f"the message has no {key!r}: {described(item)}", fix)
    tag = item[message_format.role_key]
    role = message_format.roles.get(tag, tag)
    if tag not in message_format.roles and role not in _ROLES:
        fix = f"Say under `messages: roles:` which of {', '.join(_ROLES)} it is."
        raise bad_row(row_number, source.column, f"unknown role {tag!r}", fix)
    content = item[message_format.content_key]
    message = {"role": role, "content": "", **dict.fromkeys(message_format.keys), "tool_calls": None}
    if isinstance(content, str):
        return {**message, "content": content}
    return {**message, **_joined_parts(content, source, message_format, row_number)}


def _joined_parts(
    parts: Sequence[Mapping[str, Any]], source: ColumnSource, message_format: MessageFormat, row_number: int
) -> dict[str, Any]:
    """The keys of a message that its parts fill, without the parts that ``source`` leaves out."""
    filled: dict[str, Any] = {}
    for part in parts:
        kind, value = str(part.get(message_format.part_type_key)), part.get(message_format.part_value_key)
        if kind not in message_format.parts:
            fix = f"Say under `messages: parts:` where it goes (known: {', '.join(message_format.parts)})."
            raise bad_row(row_number, source.column, f"unknown type of part {kind!r}", fix)
        if source.keep is not None and kind not in source.keep:
            continue
        place = message_format.parts[kind]
        if place == "tool_calls":
            filled.setdefault(place, []).append(_tool_call(value, source, row_number))
        elif "{}" in place:
            filled["content"] = filled.get("content", "") + place.replace("{}", str(value))
        else:
            filled[place] = filled.get(place, "") + str(value)
    return filled


def _tool_call(value: Any, source: ColumnSource, row_number: int) -> dict[str, Any]:
    """The call as OpenAI writes it, its arguments as JSON text: they have other keys in every row."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
        function = call.get("function", call)
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {"type": "function", "function": {"name": function["name"], "arguments": text}}
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        fix = "A call is {'name': .., 'arguments': {..}}, or JSON text of that."
        raise bad_row(row_number, source.column, f"not a tool call: {described(value)}", fix) from None
