"""Examples as token ids: rendering, tokenisation, and the cut between prompt and completions.

The tokens of prompt and completion are those of the two together, as the model will see them. The completion starts
where they part from the tokens of the prompt alone; over the branches, the shortest of these prefixes is the prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.encoding import Ids, TextEncoder
from prefopt.data.masks import assistant_mask
from prefopt.data.messages import is_blank
from prefopt.data.prompts import common_prefix_length
from prefopt.data.report import Status
from prefopt.data.template import ChatRenderer, Rendering, joined, prompt_rendering
from prefopt.types import COLUMN_OF_BRANCH, Branch, Message, PreferenceExample, TokenizedExample

__all__ = ["tokenize_examples"]


@dataclass(frozen=True)
class RenderedExample:
    """An example as text: what the tokenizer is given."""

    example: PreferenceExample
    prompt: str
    texts: Mapping[Branch, str]
    """branch -> prompt and completion together."""
    conversations: Mapping[Branch, tuple[list[Message], int]]
    """branch -> messages, and the index of the one where the completion begins; empty for text rows."""


def tokenize_examples(
    examples: Sequence[PreferenceExample], processing_class: Any, encode: TextEncoder
) -> list[tuple[TokenizedExample, Status]]:
    """The examples as token ids, in order, each with what was noticed (merged tokens, rewritten history).

    All texts of one kind go through the tokenizer in one call. Text rows get the tokenizer's own special tokens once
    and the EOS token once; conversations are what the template renders, and nothing is added.

    Raises:
        ValueError: the chat template fails on a row, which is named.
    """
    renderer = ChatRenderer(processing_class)
    rendered = _render_all(examples, renderer)
    ids = _encode_all(rendered, encode)
    return [_cut(item, *ids[index], renderer, encode) for index, item in enumerate(rendered)]


def _render_all(examples: Sequence[PreferenceExample], renderer: ChatRenderer) -> list[RenderedExample]:
    conversations = [_conversations(example) for example in examples]
    wanted: list[Rendering] = []
    for example, sides in zip(examples, conversations, strict=True):
        wanted += [Rendering(messages, example, COLUMN_OF_BRANCH[branch]) for branch, (messages, _) in sides.items()]
        wanted += [prompt_rendering(example)] if sides and example.prompt else []
    texts = iter(renderer.render_all(wanted))
    rendered: list[RenderedExample] = []
    for example, sides in zip(examples, conversations, strict=True):
        prompt: Any = example.prompt
        if sides:
            whole: dict[Branch, str] = {branch: next(texts) for branch in sides}
            # No template is asked to render a conversation of nothing
            rendered.append(RenderedExample(example, next(texts) if prompt else "", whole, sides))
        else:
            whole = {branch: prompt + completion for branch, completion in example.completions.items()}
            rendered.append(RenderedExample(example, prompt, whole, {}))
    return rendered


def _conversations(example: PreferenceExample) -> dict[Branch, tuple[list[Message], int]]:
    """Branch -> messages, and the index of the one where the completion begins; nothing for text."""
    if not example.is_conversational:
        return {}
    prompt: Any = example.prompt
    completions: Mapping[Branch, Any] = example.completions
    return {branch: joined(prompt, completion) for branch, completion in completions.items()}


def _encode_all(rendered: Sequence[RenderedExample], encode: TextEncoder) -> list[tuple[Ids, dict[Branch, Ids]]]:
    """For each example the ids of its prompt and of prompt + completion per branch."""
    ids: dict[int, tuple[Ids, dict[Branch, Ids]]] = {}
    for is_conversational in (False, True):
        finish = _conversation_ends if is_conversational else _text_ends
        indices = [i for i, item in enumerate(rendered) if item.example.is_conversational == is_conversational]
        families = [(rendered[i].prompt, list(rendered[i].texts.values())) for i in indices]
        encoded = encode.families(families, add_special_tokens=not is_conversational)
        for i, (prompt_ids, others) in zip(indices, encoded, strict=True):
            branch_ids: dict[Branch, Ids] = dict(zip(rendered[i].texts, others, strict=True))
            ids[i] = finish(rendered[i], prompt_ids, branch_ids, encode.tokenizer)
    return [ids[i] for i in range(len(rendered))]


def _text_ends(
    item: RenderedExample, prompt_ids: Ids, branch_ids: dict[Branch, Ids], tokenizer: Any
) -> tuple[Ids, dict[Branch, Ids]]:
    """BOS once at the start and EOS once at the end, whether the text or the tokenizer wrote them or nobody."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is not None:
        branch_ids = {branch: _without_end(ids, eos) + array("i", [eos]) for branch, ids in branch_ids.items()}
        if not item.prompt.endswith(tokenizer.eos_token):
            prompt_ids = _without_end(prompt_ids, eos)
    if bos is None:
        return prompt_ids, branch_ids
    needs_bos = not item.prompt or begins_with(prompt_ids, bos)
    return _with_start(prompt_ids, bos, needs_bos), {
        branch: _with_start(ids, bos, needs_bos) for branch, ids in branch_ids.items()
    }


def begins_with(ids: Ids, token: int) -> bool:
    return bool(ids) and ids[0] == token


def _without_end(ids: Ids, token: int) -> Ids:
    end = len(ids)
    while end and ids[end - 1] == token:
        end -= 1
    return ids[:end]


def _with_start(ids: Ids, token: int, needed: bool) -> Ids:
    if not needed:
        return ids
    start = next((place for place, other in enumerate(ids) if other != token), len(ids))
    return array("i", [token]) + ids[start:]


def _conversation_ends(
    item: RenderedExample, prompt_ids: Ids, branch_ids: dict[Branch, Ids], tokenizer: Any
) -> tuple[Ids, dict[Branch, Ids]]:
    """What the template renders; an empty prompt is the BOS, where the template begins with one."""
    bos = tokenizer.bos_token_id
    if not item.example.prompt and bos is not None and all(begins_with(ids, bos) for ids in branch_ids.values()):
        return array("i", [bos]), branch_ids
    return prompt_ids, branch_ids


def _cut(
    item: RenderedExample,
    prompt_ids: Ids,
    branch_ids: dict[Branch, Ids],
    renderer: ChatRenderer,
    encode: TextEncoder,
) -> tuple[TokenizedExample, Status]:
    """Prompt and completions apart, with their loss masks."""
    cut = min(common_prefix_length(prompt_ids, ids) for ids in branch_ids.values())
    status = Status.MERGED if cut < len(prompt_ids) else Status(0)
    if not item.conversations and _says_only_eos(item.example, encode.tokenizer.eos_token):
        status |= Status.EMPTY
    masks: dict[Branch, list[bool]] = {}
    for branch, ids in branch_ids.items():
        mask = _loss_mask(item, branch, ids, cut, renderer, encode)
        status |= Status.REWRITTEN if mask is None else Status(0)
        masks[branch] = mask if mask is not None else [True] * (len(ids) - cut)
    completion_ids: dict[Branch, Ids] = {branch: ids[cut:] for branch, ids in branch_ids.items()}
    tokens = TokenizedExample(
        row=item.example.row,
        prompt_ids=prompt_ids[:cut],
        completion_ids=completion_ids,
        loss_masks=masks,
        ref_sum_logps=item.example.ref_sum_logps,
    )
    return tokens, status


def _says_only_eos(example: PreferenceExample, eos_token: str | None) -> bool:
    """Whether a completion of a text row is the EOS token's text and nothing else."""
    completions: list[Any] = list(example.completions.values())
    return bool(eos_token) and any(is_blank(text.replace(eos_token, "")) for text in completions)


def _loss_mask(
    item: RenderedExample, branch: Branch, ids: Ids, cut: int, renderer: ChatRenderer, encode: TextEncoder
) -> list[bool] | None:
    """The whole completion, but of several turns the assistant's alone; ``None`` where that cannot be told."""
    if not item.conversations:
        return [True] * (len(ids) - cut)
    messages, first = item.conversations[branch]
    if len(messages) - first == 1 and item.example.prompt:
        return [True] * (len(ids) - cut)
    return assistant_mask(
        renderer,
        encode,
        item.example,
        COLUMN_OF_BRANCH[branch],
        messages=messages,
        first=first,
        text=item.texts[branch],
        ids=ids,
        cut=cut,
    )
