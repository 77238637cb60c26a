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
from prefopt.data.errors import check_text
from prefopt.data.image_text import expanded, make_reader
from prefopt.data.image_tokens import divided
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
    prompts: Mapping[Branch, str]
    """branch -> the prompt alone; they differ where branches have other images."""
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
        ValueError: the chat template fails on a row, or does not write its images; the row is named.
    """
    renderer, reader = ChatRenderer(processing_class), make_reader(processing_class)
    rendered = _render_all(examples, renderer, "" if reader is None else reader.token)
    ids = _encode_all(rendered, encode)
    tokenized = [_cut(item, *ids[index], renderer, encode) for index, item in enumerate(rendered)]
    if reader is None:
        return tokenized
    pairs = zip(examples, tokenized, strict=True)
    return [(divided(tokens, example.images, reader), status) for example, (tokens, status) in pairs]


def _render_all(
    examples: Sequence[PreferenceExample], renderer: ChatRenderer, image_token: str
) -> list[RenderedExample]:
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
            opened = next(texts) if prompt else ""
            prompts = _written(dict.fromkeys(whole, opened), example, image_token)
        else:
            said: dict[Branch, str] = {b: prompt + completion for b, completion in example.completions.items()}
            whole = _written(said, example, image_token)
            prompts = _written(dict.fromkeys(said, str(prompt)), example, image_token)
        rendered.append(RenderedExample(example, prompts, whole, sides))
    return rendered


def _written(texts: dict[Branch, str], example: PreferenceExample, image_token: str) -> dict[Branch, str]:
    """The texts with what the processor writes in the places of each branch's images."""
    if not example.images:
        return texts
    return {branch: expanded(text, image_token, example.images.get(branch, ())) for branch, text in texts.items()}


def _conversations(example: PreferenceExample) -> dict[Branch, tuple[list[Message], int]]:
    """Branch -> messages, and the index of the one where the completion begins; nothing for text."""
    if not example.is_conversational:
        return {}
    prompt: Any = example.prompt
    completions: Mapping[Branch, Any] = example.completions
    return {branch: joined(prompt, completion) for branch, completion in completions.items()}


def _encode_all(
    rendered: Sequence[RenderedExample], encode: TextEncoder
) -> list[tuple[dict[Branch, Ids], dict[Branch, Ids]]]:
    """For each example the ids of its prompt and of prompt + completion, per branch."""
    ids: dict[int, tuple[dict[Branch, Ids], dict[Branch, Ids]]] = {}
    for is_conversational in (False, True):
        finish = _conversation_ends if is_conversational else _text_ends
        indices = [i for i, item in enumerate(rendered) if item.example.is_conversational == is_conversational]
        groups = [(i, branches) for i in indices for branches in _with_same_prompt(rendered[i])]
        prompts = [rendered[i].prompts[branches[0]] for i, branches in groups]
        texts = [[rendered[i].texts[branch] for branch in branches] for i, branches in groups]
        encoded = encode.families(list(zip(prompts, texts, strict=True)), add_special_tokens=not is_conversational)
        for (i, branches), prompt, (prompt_ids, others) in zip(groups, prompts, encoded, strict=True):
            prompt_ids, others = finish(prompt, prompt_ids, others, encode.tokenizer)
            of_prompts, of_texts = ids.setdefault(i, ({}, {}))
            of_prompts |= dict.fromkeys(branches, prompt_ids)
            of_texts |= zip(branches, others, strict=True)
    return [ids[i] for i in range(len(rendered))]


def _with_same_prompt(item: RenderedExample) -> list[list[Branch]]:
    """The branches by the text of their prompt, which is nearly always one."""
    for branch, text in item.texts.items():
        check_text(text, item.example.row, COLUMN_OF_BRANCH[branch])
    groups: dict[str, list[Branch]] = {}
    for branch, prompt in item.prompts.items():
        check_text(prompt, item.example.row, "prompt")
        groups.setdefault(prompt, []).append(branch)
    return list(groups.values())


def _text_ends(prompt: str, prompt_ids: Ids, texts_ids: Sequence[Ids], tokenizer: Any) -> tuple[Ids, Sequence[Ids]]:
    """BOS once at the start and EOS once at the end, whether the text or the tokenizer wrote them or nobody."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is not None:
        texts_ids = [_without_end(ids, eos) + array("i", [eos]) for ids in texts_ids]
        if not prompt.endswith(tokenizer.eos_token):
            prompt_ids = _without_end(prompt_ids, eos)
    if bos is None:
        return prompt_ids, texts_ids
    needs_bos = not prompt or begins_with(prompt_ids, bos)
    return _with_start(prompt_ids, bos, needs_bos), [_with_start(ids, bos, needs_bos) for ids in texts_ids]


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
    prompt: str, prompt_ids: Ids, texts_ids: Sequence[Ids], tokenizer: Any
) -> tuple[Ids, Sequence[Ids]]:
    """What the template renders; an empty prompt is the BOS, where the template begins with one."""
    bos = tokenizer.bos_token_id
    if not prompt and bos is not None and all(begins_with(ids, bos) for ids in texts_ids):
        return array("i", [bos]), texts_ids
    return prompt_ids, texts_ids


def _cut(
    item: RenderedExample,
    prompts_ids: Mapping[Branch, Ids],
    texts_ids: Mapping[Branch, Ids],
    renderer: ChatRenderer,
    encode: TextEncoder,
) -> tuple[TokenizedExample, Status]:
    """Prompt and completions apart, with their loss masks."""
    prompt_ids = next(iter(prompts_ids.values()))
    cut = min(common_prefix_length(prompt_ids, ids) for ids in texts_ids.values())
    ends: dict[Branch, int] = dict.fromkeys(texts_ids, cut)
    merged = cut < len(prompt_ids)
    if any(ids is not prompt_ids for ids in prompts_ids.values()):
        # What a branch has of its own prompt after the cut, where its images are others, is not trained on
        ends = {branch: common_prefix_length(ids, texts_ids[branch]) for branch, ids in prompts_ids.items()}
        merged = any(end < len(prompts_ids[branch]) for branch, end in ends.items())
    status = Status.MERGED if merged else Status(0)
    if not item.conversations and _says_only_eos(item.example, encode.tokenizer.eos_token):
        status |= Status.EMPTY
    masks: dict[Branch, list[bool]] = {}
    for branch, ids in texts_ids.items():
        end = max(ends[branch], cut)
        mask = _loss_mask(item, branch, ids, end, renderer, encode)
        status |= Status.REWRITTEN if mask is None else Status(0)
        masks[branch] = [False] * (end - cut) + (mask if mask is not None else [True] * (len(ids) - end))
    completion_ids: dict[Branch, Ids] = {branch: texts_ids[branch][cut:] for branch in item.texts}
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
