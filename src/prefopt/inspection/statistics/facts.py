"""A row's own facts: its format, what it says as keys that can be compared, how long its parts are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from prefopt.data.encode import status_of_text
from prefopt.data.image_places import TAG
from prefopt.data.image_text import PictureReader
from prefopt.data.messages import text_of
from prefopt.data.pair_numbers import pair_numbers
from prefopt.data.rankings import is_ranked
from prefopt.data.schema import parse_row
from prefopt.inspection.statistics.sketches import sketch
from prefopt.types import PAIR, Branch, Message, PreferenceExample, TokenizedExample

__all__ = ["RowFacts", "StoredImages", "row_facts"]

Completion = str | list[Message]


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is kept of a row: nothing that grows with its text.

    Args:
        row: its number.
        form: its format, in words.
        status: why there is nothing to learn from it, as far as its text tells; a `Status`.
        pair, exchanged: keys of what it says, and of the same with the two completions exchanged.
        prompt: key of its prompt.
        sketch: [120] see `sketch`.
        characters, words: of the prompt and each completion; none for a row of token ids.
        roles: of its messages; none for text.
        num_turns: turns of the user.
        system: key of its system prompt; None without one.
        num_images, has_tools: what else it has.
    """

    row: int
    form: str
    status: int
    pair: bytes
    exchanged: bytes
    prompt: bytes
    sketch: NDArray[np.uint32]
    characters: tuple[int, ...]
    words: tuple[int, ...]
    roles: frozenset[str]
    num_turns: int
    system: bytes | None
    num_images: int
    has_tools: bool


@dataclass(frozen=True)
class StoredImages(PictureReader):
    """Stands in for a model's processor where there is none: an image is what is stored of it, unopened."""

    processor: Any = None

    @property
    def token(self) -> str:  # type: ignore[override]
        """The place of an image in a text: what data sets write, as no model says."""
        return TAG

    def __call__(self, value: Any, row: int, column: str) -> Any:
        return value


def row_facts(
    row: Mapping[str, Any], number: int, branches: Sequence[Branch], read_image: PictureReader | None
) -> RowFacts:
    """The facts of one row.

    Args:
        row: column name -> value.
        number: its place in the user's data set.
        branches: the completions that a run needs.
        read_image: reads its images.

    Raises:
        ValueError: the row is broken, as a run would say it.
    """
    pair_numbers(row, number)
    example = parse_row(row, number, branches, read_image)
    if isinstance(example, TokenizedExample):
        parts: list[Any] = [example.prompt_ids, *example.completion_ids.values()]
        return facts_of(example, parts, example.completion_ids, [list(example.images.values())], "token ids")
    parts = [example.prompt, *example.completions.values()]
    kind = "messages" if example.is_conversational else "text"
    if is_ranked(row):
        form = f"ranked completions of {kind}"
    else:
        form = f"{kind}, prompt in its own column" if "prompt" in row else f"{kind}, prompt within the completions"
    others = [example.tools, example.chat_template_kwargs, list(example.images.values())]
    return facts_of(example, parts, example.completions, others, form)


def facts_of(
    example: PreferenceExample | TokenizedExample,
    parts: Sequence[Any],
    completions: Mapping[Branch, Any],
    others: Sequence[Any],
    form: str,
) -> RowFacts:
    """The facts of an example whose prompt and completions are ``parts``; ``others`` is what else it is about."""
    texts = [said(part) for part in parts]
    more = [written(value) for branch, value in completions.items() if branch not in PAIR]
    context = [written(parts[0]), *more, *map(written, others)]
    chosen, rejected = (written(completions[branch]) for branch in PAIR)
    is_text = isinstance(example, PreferenceExample)
    messages = parts[0] + completions["chosen"] if is_text and example.is_conversational else []
    roles = frozenset(m["role"] for part in parts for m in part) if messages else frozenset()
    system = [text_of(message["content"]) for message in messages if message["role"] in ("system", "developer")]
    return RowFacts(
        row=example.row,
        form=form,
        status=int(status_of_text(example)) if is_text else 0,
        pair=key(*context, chosen, rejected),
        exchanged=key(*context, rejected, chosen),
        prompt=key(written(parts[0]), *map(written, others)),
        sketch=sketch("\n".join(texts)),
        characters=tuple(map(len, texts)) if is_text else (),
        words=tuple(len(text.split()) for text in texts) if is_text else (),
        roles=roles,
        num_turns=sum(message["role"] == "user" for message in messages),
        system=key(*system) if system else None,
        num_images=max(map(len, example.images.values()), default=0),
        has_tools=bool(is_text and example.tools),
    )


def said(part: Any) -> str:
    """What a prompt or completion says, without its roles; of token ids their numbers."""
    if isinstance(part, str):
        return part
    if not all(isinstance(item, Mapping) for item in part):
        return " ".join(map(str, part))
    calls = (written(message["tool_calls"]) for message in part if message.get("tool_calls"))
    return "\n".join([*(text_of(message["content"]) for message in part), *calls])


def written(value: Any) -> str:
    """A value as one text, the same for the same value."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=key_of)


def key_of(value: Any) -> Any:
    """What JSON cannot hold: images."""
    if isinstance(value, bytes):
        return xxhash.xxh3_128_hexdigest(value)
    stored = getattr(value, "stored", None)
    return list(value) if stored is None else stored


def key(*texts: str) -> bytes:
    """16 bytes for a sequence of texts."""
    digest = xxhash.xxh3_128()
    for text in texts:
        content = text.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()
