"""Completions of several turns train on what the assistant said, against five kinds of templates."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import (
    CHATML,
    HEADER_AFTER_USER,
    LLAMA,
    MARKED,
    REWRITING,
    TOOLS,
    assistant,
    byte_tokenizer,
    prepared,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.encoding import TextEncoder
from prefopt.data.render import tokenize_examples
from prefopt.data.report import Status
from prefopt.types import PreferenceExample

CONTENT = st.text(st.sampled_from("abino the.\n'1é漢"), min_size=1, max_size=8).filter(str.strip)
CLOSINGS = {
    CHATML: "{}<|im_end|>\n",
    MARKED: "{}<|im_end|>",
    LLAMA: " {}</s>",
    HEADER_AFTER_USER: "{}<|im_end|>\n",
    TOOLS: "{}<|im_end|>\n",
}
"""Template -> what it makes of an assistant's message, once the turn has begun."""


def message(role: str) -> st.SearchStrategy[dict[str, str]]:
    return st.builds(lambda content: {"role": role, "content": content}, CONTENT)


LATER = st.lists(
    st.tuples(st.sampled_from(["user", "tool"]).flatmap(message), message("assistant")), min_size=1, max_size=3
)
COMPLETION = st.builds(
    lambda first, later: [first, *(turn for exchange in later for turn in exchange)], message("assistant"), LATER
)
PROMPT = st.builds(
    lambda exchanges, last: [*(turn for exchange in exchanges for turn in exchange), last],
    st.lists(st.tuples(message("user"), message("assistant")), max_size=2),
    message("user"),
)


@settings(deadline=None, max_examples=40)
@given(PROMPT, COMPLETION, COMPLETION)
@pytest.mark.parametrize("template", CLOSINGS, ids=["chatml", "marked", "llama", "header", "tools"])
def test_masks_cover_exactly_what_the_assistant_says(template: str, prompt: Any, chosen: Any, rejected: Any) -> None:
    tokenizer = byte_tokenizer(bos=template == LLAMA, template=template)
    example = PreferenceExample(0, prompt, {"chosen": chosen, "rejected": rejected})
    [(tokens, status)] = tokenize_examples([example], tokenizer, TextEncoder(tokenizer))
    assert not status & Status.REWRITTEN
    for branch, completion in example.completions.items():
        pairs = zip(tokens.completion_ids[branch], tokens.loss_masks[branch], strict=True)
        said = [turn["content"] for turn in completion if turn["role"] == "assistant"]  # type: ignore[index]
        trained = tokenizer.decode([token for token, is_trained in pairs if is_trained])
        assert trained == "".join(CLOSINGS[template].format(content) for content in said)


def test_a_single_turn_is_trained_on_whole() -> None:
    """As TRL does, also with a template that marks less (here without the line break after the turn)."""
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    [kept] = prepared([row], byte_tokenizer(template=MARKED))
    assert all(kept["chosen_mask"])


def test_a_continued_turn_is_trained_on_from_where_it_goes_on() -> None:
    tokenizer = byte_tokenizer()
    later = [assistant(" you"), user("b"), assistant("c")]
    row = {"prompt": [user("a"), assistant("Hi")], "chosen": later, "rejected": [assistant(" me")]}
    [kept] = prepared([row], tokenizer)
    pairs = zip(kept["chosen_ids"], kept["chosen_mask"], strict=True)
    assert tokenizer.decode([token for token, trained in pairs if trained]) == " you<|im_end|>\nc<|im_end|>\n"


def test_a_template_that_rewrites_history_gets_the_whole_completion(caplog: pytest.LogCaptureFixture) -> None:
    turns = [assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]
    rows = [
        {"prompt": [user("a")], "chosen": turns, "rejected": [assistant("e")]},
        {"prompt": [user("a")], "chosen": turns, "rejected": [assistant("f")]},
        {"prompt": [user("a")], "chosen": [assistant("x")], "rejected": [assistant("f")]},
    ]
    kept = prepared(rows, byte_tokenizer(template=REWRITING))
    assert all(all(row["chosen_mask"]) for row in kept)
    warnings = [record.message for record in caplog.records if "rewrites" in record.message]
    assert len(warnings) == 1
    assert "in 2 of 3 rows" in warnings[0]


def test_several_turns_without_an_assistant_teach_nothing() -> None:
    rows = [
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"prompt": [user("a")], "chosen": [user("b"), user("c")], "rejected": [assistant("c")]},
    ]
    assert prepared(rows, byte_tokenizer())["row"] == [0]


def test_tool_calls_are_trained_on_and_their_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    tokenizer = byte_tokenizer(template=TOOLS)
    row = {"prompt": [user("1+1?")], "chosen": turns, "rejected": [assistant("3")]}
    [kept] = prepared([row], tokenizer)
    pairs = zip(kept["chosen_ids"], kept["chosen_mask"], strict=True)
    said = '<call>add {"a": 1}</call><|im_end|>\ntwo<|im_end|>\n'
    assert tokenizer.decode([token for token, trained in pairs if trained]) == said
