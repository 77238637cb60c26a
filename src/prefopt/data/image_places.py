"""Which image stands in which place of a row: images in columns, images in messages, and places that wait for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.errors import bad_row
from prefopt.data.image_text import PictureReader, RowImage
from prefopt.data.messages import no_processor, parts_of, text_of
from prefopt.types import COLUMN_OF_BRANCH, Branch, Message

__all__ = ["image_columns", "place_images", "read_columns"]

Completion = str | list[Message]
Place = RowImage | None
"""A place with the image that the message holds, or one that a column fills."""

SHARED = "images"

TAG = "<image>"
"""What many data sets write in the place of an image, whatever the model's own token is."""


def image_columns(branches: Sequence[Branch]) -> list[str]:
    """The columns that may hold images: of all branches, and of one of them in place of those."""
    return [name for column in ("", *branches) for name in _spellings(column)]


def _spellings(branch: str) -> tuple[str, str]:
    prefix = f"{COLUMN_OF_BRANCH[branch]}_" if branch else ""  # type: ignore[index]
    return f"{prefix}images", f"{prefix}image"


def read_columns(
    row: Mapping[str, Any], row_number: int, branches: Sequence[Branch], read: PictureReader | None
) -> dict[str, list[RowImage]]:
    """The images in the row's columns: under ``""`` those of all branches, under a branch its own.

    Raises:
        ValueError: an image cannot be read, or ``read`` is None and there are images; row and column are named.
    """
    found: dict[str, list[RowImage]] = {}
    for key in ("", *branches):
        for column in _spellings(key):
            value = row.get(column)
            if value is None or key in found:
                continue
            values = list(value) if isinstance(value, list | tuple) else [value]
            values = [item for item in values if item is not None and not _is_empty(item)]
            if values and read is None:
                raise no_processor(row_number, column, "the row has images", "the column")
            if values:
                found[key] = [read(item, row_number, column) for item in values]  # type: ignore[misc]
    return found


def _is_empty(value: Any) -> bool:
    """Whether it is what Arrow writes for an image that is not there."""
    return isinstance(value, Mapping) and all(item is None for item in value.values())


def place_images(
    prompt: Completion,
    completions: dict[Branch, Completion],
    given: Mapping[str, list[RowImage]],
    row: int,
    token: str,
) -> tuple[Completion, dict[Branch, Completion], dict[Branch, list[RowImage]]]:
    """Prompt and completions with a place for every image, and for each branch its images in the order of the places.

    A place is a part ``{"type": "image"}`` of a message, or ``token`` in a text. The places of prompt and completion
    that hold no image are filled in order: from the branch's own column, else from that of all branches; a branch's
    own column may also fill those of its completion alone. Where a conversation has no place, `TAG` in the text of its
    messages is one, if it stands there as often as there are images; else they are made at the start of its first user
    turn.

    Raises:
        ValueError: there are more or fewer images than places; row and column are named.
    """
    if not isinstance(prompt, str):
        prompt, completions = _with_tags_as_places(prompt, completions, given, token)
        prompt, completions = _with_places(prompt, completions, given, row, token)
    before = list(_places(prompt, token))
    images: dict[Branch, list[RowImage]] = {}
    for branch, completion in completions.items():
        places = [*before, *_places(completion, token)]
        own, shared = given.get(branch, []), given.get("", [])
        free = places.count(None)
        filling = own or shared
        if own and len(own) != free and len(own) + len(shared) == free and len(shared) == before.count(None):
            filling = [*shared, *own]
        if len(filling) != free:
            raise _mismatch(row, branch if own else "", len(filling), free, prompt, token)
        fill = iter(filling)
        images[branch] = [next(fill) if place is None else place for place in places]
    without: dict[Branch, Completion] = {branch: _without_images(item) for branch, item in completions.items()}
    return _without_images(prompt), without, {branch: own for branch, own in images.items() if own}


def _with_tags_as_places(
    prompt: list[Message], completions: dict[Branch, Completion], given: Mapping[str, list[RowImage]], token: str
) -> tuple[list[Message], dict[Branch, Completion]]:
    """The conversations with a place for every `TAG`, if that gives each side as many as it has images."""
    for branch, completion in completions.items():
        said: Any = [*prompt, *completion]
        num_tags = sum(text_of(message["content"]).count(TAG) for message in said)
        if any(True for _ in _places(said, token)) or num_tags != len(given.get(branch) or given.get("", [])):
            return prompt, completions

    def tagged(messages: Any) -> Any:
        return [{**message, "content": _split(message["content"])} for message in messages]

    return tagged(prompt), {branch: tagged(completion) for branch, completion in completions.items()}


def _split(content: Any) -> Any:
    """A text as parts, with a place for every `TAG`.

    >>> _split("<image> or?")
    [{'type': 'image'}, {'type': 'text', 'text': ' or?'}]
    """
    first, *others = text_of(content).split(TAG)
    if not others:
        return content
    texts = [{"type": "text", "text": text} for text in (first, *others)]
    parts = [texts[0], *(part for text in texts[1:] for part in ({"type": "image"}, text))]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _mismatch(row: int, branch: str, num_images: int, num_places: int, prompt: Completion, token: str) -> ValueError:
    column = _spellings(branch)[0]
    if isinstance(prompt, str):
        fix = f"Write {token!r} in the text where an image stands, once for each."
        return bad_row(row, column, f"{num_images} images for {num_places} image tokens in the text", fix)
    fix = "Give each image one part {'type': 'image'} in the messages of prompt and completion, or leave all out."
    return bad_row(row, column, f"{num_images} images for {num_places} image parts", fix)


def _places(said: Completion, token: str) -> Iterator[Place]:
    contents = [said] if isinstance(said, str) else [message["content"] for message in said]
    for content in contents:
        for part in parts_of(content):
            if part["type"] == "image":
                yield part.get("image")
            else:
                yield from [None] * part["text"].count(token)


def _with_places(
    prompt: list[Message],
    completions: dict[Branch, Completion],
    given: Mapping[str, list[RowImage]],
    row: int,
    token: str,
) -> tuple[list[Message], dict[Branch, Completion]]:
    """The conversations with places at the start of the first user turn, where they have none that waits for an image.

    A turn of the prompt is all branches' own, so that it gets as many places as each of them has images.
    """
    wanted: dict[Branch, int] = {}
    for branch, completion in completions.items():
        places = [*_places(prompt, token), *_places(completion, token)]
        wanted[branch] = 0 if None in places else len(given.get(branch) or given.get("", []))
    if not any(wanted.values()):
        return prompt, completions
    user = _first_user(prompt)
    if user is None:
        return prompt, {
            branch: _with_parts(completion, _first_user(completion), wanted[branch], row)
            for branch, completion in completions.items()
        }
    if len(set(wanted.values())) > 1:
        lacking = ", ".join(f"{branch}: {count}" for branch, count in wanted.items())
        problem = f"the prompt cannot hold for all sides the places that they lack ({lacking})"
        fix = "Write the places as parts {'type': 'image'} of the messages, and images of one side in `<side>_images`."
        raise bad_row(row, SHARED, problem, fix)
    return _with_parts(prompt, user, max(wanted.values()), row), completions


def _first_user(messages: Any) -> int | None:
    return next((index for index, message in enumerate(messages) if message["role"] == "user"), None)


def _with_parts(messages: Any, index: int | None, count: int, row: int) -> list[Message]:
    if not count:
        return messages
    if index is None:
        raise bad_row(row, SHARED, "there is no user turn to put the images in", "Write one.")
    content = [{"type": "image"} for _ in range(count)] + [dict(part) for part in parts_of(messages[index]["content"])]
    return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]


def _without_images(said: Completion) -> Any:
    """The messages with their places alone, as templates take them."""
    if isinstance(said, str):
        return said
    return [{**message, "content": _as_places(message["content"])} for message in said]


def _as_places(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]
