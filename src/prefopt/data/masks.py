"""Which tokens of a completion of several turns the assistant said.

Two ways, the first that works: the template's own ``{% generation %}`` markers, and rendering prefixes of the
conversation: an assistant turn is what its message adds to the text before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefopt.data.messages import text_of
from prefopt.data.prompts import common_prefix_length
from prefopt.data.template import ChatRenderer
from prefopt.types import Message, PreferenceExample

__all__ = ["assistant_mask"]

Encode = Callable[[list[str]], Sequence[Sequence[int]]]


def assistant_mask(
    renderer: ChatRenderer,
    encode: Encode,
    example: PreferenceExample,
    column: str,
    *,
    messages: Sequence[Message],
    first: int,
    text: str,
    ids: Sequence[int],
    cut: int,
) -> list[bool] | None:
    """Which of the tokens ``ids[cut:]`` the assistant said.

    Args:
        renderer: of the template.
        encode: texts to token ids, nothing added.
        example: the row, for its tools, its template's options and its number.
        column: the completion's column, for messages.
        messages: prompt and completion.
        first: index of the message where the completion begins.
        text: ``messages`` as rendered.
        ids: [n] tokens of ``text``.
        cut: number of them that are the prompt.

    Returns:
        [n - cut] booleans, or ``None`` where the template rewrites earlier turns once later ones follow, so that
        no prefix can tell who said what.
    """
    if renderer.has_markers(example):
        marked_ids, mask = renderer.tokens_with_markers(messages, example, column)
        if list(marked_ids) == list(ids):
            return mask[cut:]
    mask = [False] * len(ids)
    end = cut
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        closed = text if index == len(messages) - 1 else renderer.render(messages[: index + 1], example, column)
        if not text.startswith(closed):
            return None
        if index == first and example.prompt:
            start = cut
        else:
            opened = _opened(renderer, example, column, messages, index, text)
            start = common_prefix_length(encode([opened])[0], ids)
        if start < end:
            return None
        end = len(ids) if closed == text else common_prefix_length(encode([closed])[0], ids)
        mask[start:end] = [True] * (end - start)
    return mask[cut:]


def _opened(
    renderer: ChatRenderer, example: PreferenceExample, column: str, messages: Sequence[Message], index: int, text: str
) -> str:
    """The text up to where the assistant's message number ``index`` begins."""
    if index:
        return renderer.render(messages[:index], example, column, add_generation_prompt=True)
    return text[: max(text.find(text_of(messages[0]["content"]).strip()), 0)]
