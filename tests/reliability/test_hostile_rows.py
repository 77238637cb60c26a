"""Rows of a stranger: each is prepared, skipped and counted, or refused with its number and its column."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scale import scaled
from tiny_models import word_tokenizer

from prefopt.data import PrepareOptions, prepare_dataset, template_process
from prefopt.quickstart.report import cell
from prefopt.terminal import harmless
from prefopt.trainer.card_facts import DataSet
from prefopt.trainer.model_card import model_card
from prefopt.trainer.samples import Sample, SampleTable, markdown, summary

OPTIONS = PrepareOptions(("chosen", "rejected"), 64, "keep_start")
NAMED = re.compile(r"^train data, row \d+, column '[^']*': [^\n]+\.")
NOTHING_LEFT = re.compile(r"^train data: none of the \d+ rows can be trained on: ")
NO_COLUMN = re.compile(r"^train data: no column '(chosen|rejected)'")
SECONDS = 20.0
"""For ten million characters on a busy machine; the sample has one."""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def prepared(rows: list[Any], options: PrepareOptions = OPTIONS) -> list[Any]:
    """The rows of a stream: nothing stands between them and us, as Arrow does for a set."""
    stream: Any = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), word_tokenizer(), options, name="train"
    )
    return list(stream)


def outcome(rows: list[Any]) -> str:
    """The message, or nothing where the rows were prepared; any error but ours goes on."""
    try:
        prepared(rows)
    except ValueError as error:
        message = str(error)
    else:
        return ""
    assert any(pattern.match(message) for pattern in (NAMED, NOTHING_LEFT, NO_COLUMN)), message
    assert harmless(message) == message
    return message


PAIR: dict[str, Any] = {"prompt": "baba", "chosen": " dada", "rejected": " fafa"}
CHAT: dict[str, Any] = {"prompt": [user("baba")], "chosen": [said("dada")], "rejected": [said("fafa")]}
DEEP = "[" * 100_000
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"chosen": 3}, "'chosen': expected text or a list of messages, got int 3"),
    "not a number": ({"chosen": float("nan")}, "'chosen': expected text or a list of messages, got float nan"),
    "a truth": ({"rejected": True}, "'rejected': expected text or a list of messages, got bool True"),
    "bytes": ({"prompt": b"baba"}, "'prompt': expected text or a list of messages, got bytes"),
    "a mapping": ({"prompt": {"role": "user"}}, "'prompt': expected text or a list of messages, got dict"),
    "ten thousand keys": ({"prompt": {str(i): i for i in range(10_000)}}, "'prompt': expected text or a list"),
    "nothing": ({"chosen": None}, "'chosen': the value is None"),
    "half a character": ({"chosen": " dada \ud800"}, "'chosen': the text has half a character"),
    "half a character before": ({"prompt": "\udfff"}, "'(prompt|chosen)': the text has half a character"),
    "text as message": ({**CHAT, "chosen": ["dada"]}, r"'chosen\[0\]': expected a message, got str"),
    "a list as message": ({**CHAT, "chosen": [[said("dada")]]}, r"'chosen\[0\]': expected a message, got list"),
    "no role": ({**CHAT, "prompt": [{"content": "baba"}]}, r"'prompt\[0\]': the message has no 'role'"),
    "a number as role": (
        {**CHAT, "prompt": [{"role": 1, "content": "a"}]},
        r"'prompt\[0\]': the message has no 'role'",
    ),
    "numbers as keys": ({**CHAT, "prompt": [{1: 2, None: 3}]}, r"'prompt\[0\]': the message has no 'role'"),
    "a number as content": ({**CHAT, "prompt": [user(3)]}, r"'prompt\[0\]': the content is int 3"),
    "half a character in a message": ({**CHAT, "chosen": [said("\ud800")]}, "'chosen': the text has half"),
    "half a character as role": ({**CHAT, "prompt": [{"role": "\ud800", "content": "a"}]}, "the text has half"),
    "parts of parts": ({**CHAT, "prompt": [user([[[{"type": "text", "text": "a"}]]])]}, r"'prompt\[0\]': the content"),
    "tools that are no JSON": ({**CHAT, "tools": "{"}, "'tools': the text is not JSON"),
    "deep tools": ({**CHAT, "tools": DEEP}, "'tools': the text is not JSON"),
    "tools that are text": ({**CHAT, "tools": '"baba"'}, "'tools': expected a list, got str"),
    "calls that are text": ({**CHAT, "chosen": [{**said("a"), "tool_calls": "baba"}]}, "'.*': "),
    "calls that are numbers": ({**CHAT, "chosen": [{**said("a"), "tool_calls": [1, 2]}]}, "'.*': "),
    "other options of the template": (
        {**CHAT, "chat_template_kwargs": {"tokenize": True}},
        "'chosen': the chat template",
    ),
    "a weight that is no number": ({"weight": "much"}, "'weight': "),
    "a weight that is not a number": ({"weight": float("nan")}, "'weight': "),
    "ids that are no ids": (
        {"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [2]},
        "'chosen_ids': expected token",
    ),
    "ids as an array": ({"prompt_ids": [1], "chosen_ids": np.array([1.5]), "rejected_ids": [2]}, "'chosen_ids': "),
    "a colour": ({"chosen": {"\x1b[31m": "\x1b]0;x\x07"}}, r"'chosen': expected text .*\\x1b"),
    "a colour as key": ({**CHAT, "prompt": [{"\x1b[31m\r\u202e": 1}]}, r"has no 'role' .*\\x1b\[31m\\r\\u202e"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named(name: str) -> None:
    change, message = BROKEN[name]
    first = {**PAIR, "weight": 1.0} if "weight" in change else PAIR
    said = outcome([first, {**PAIR, **change}])
    assert re.match(rf"train data, row 1, column .*{message.removeprefix(chr(39))}", said), said


def test_what_is_odd_is_taken() -> None:
    rows = [
        {**PAIR, "chosen": " da\x00da"},
        {**PAIR, "prompt": "ba\u202eba \x1b[31m \r"},
        {**CHAT, "prompt": [{**user("baba"), **{f"key {i}": i for i in range(10_000)}}]},
        {**CHAT, "prompt": [user([{"type": "text", "text": "ba"}] * 1000)]},
        {**CHAT, "prompt": [*([user("baba"), said("fafa")] * 4), user("baba")]},
    ]
    assert len(prepared(rows)) == len(rows)


def test_special_tokens_written_in_data_are_special_tokens() -> None:
    """As in TRL and transformers; SECURITY.md says so."""
    [row] = prepared([{**CHAT, "prompt": [user("baba <|im_end|> <|im_start|> system dada")]}])
    tokenizer = word_tokenizer()
    assert row["prompt_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("row", [PAIR, CHAT], ids=["text", "chat"])
def test_a_huge_prompt_is_cut_in_time(row: dict[str, Any]) -> None:
    huge = "baba " * scaled(200_000, 2_000_000)
    start = time.monotonic()
    [kept] = prepared([{**row, "prompt": huge if row is PAIR else [user(huge)]}], PrepareOptions(PAIRS, 64, "keep_end"))
    assert len(kept["chosen_ids"]) <= 64
    assert time.monotonic() - start < SECONDS


PAIRS = ("chosen", "rejected")
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(alphabet=st.characters(), max_size=20),
    st.sampled_from(["baba", " dada", "<|im_end|>", "\x00", "\ud800", "user", "assistant", "\x1b[2J", "{{ 1 }}", "[]"]),
    st.binary(max_size=5),
)
KEYS = st.sampled_from(["role", "content", "type", "text", "image", "tool_calls", "function", "arguments", "name"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": VALUES}),
    min_size=1,
    max_size=3,
)
OTHERS = ("tools", "chat_template_kwargs", "weight", "margin", "images", "completions", "ref_chosen_logps")
ROWS = st.fixed_dictionaries(
    {name: VALUES | MESSAGES | st.text(max_size=9) for name in ("prompt", *PAIRS)},
    optional=dict.fromkeys(OTHERS, VALUES),
)


@settings(
    max_examples=scaled(80, 5000),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(row=ROWS)
def test_any_row_is_prepared_or_named(row: dict[str, Any]) -> None:
    outcome([row])


def test_the_figure_of_rows(figure: Callable[[str, str], None]) -> None:
    template_process.end_template_process()
    figure("broken rows", f"{len(BROKEN)} kinds and {scaled(80, 5000)} random rows: each prepared, skipped or named")


# -- what is shown of data ---------------------------------------------------------------------------------------------

HOSTILE = (
    "\x1b[2J\x1b]8;;http://x.example\x07[a](javascript:1) ![i](http://x.example/i) <img src=x onerror=1>|\r\u202e`x`"
)
SHOWN: dict[str, Callable[[], str]] = {
    "samples in the log": lambda: summary(SampleTable("eval", 1, [Sample(HOSTILE, "a", "b", HOSTILE, None)])),
    "samples in trackers": lambda: markdown(SampleTable("eval", 1, [Sample(HOSTILE, "a", "b", HOSTILE, None)])),
    "quickstart": lambda: cell(HOSTILE),
    "card": lambda: model_card(
        method="dpo", model_name=HOSTILE, datasets=[DataSet(HOSTILE, HOSTILE, "1")], settings={"optim": HOSTILE}
    ),
    "row": lambda: outcome([{**PAIR, "chosen": {HOSTILE: HOSTILE}}]),
    "template": lambda: outcome(
        [{**CHAT, "chat_template_kwargs": {"chat_template": f"{{{{ raise_exception({json.dumps(HOSTILE)}) }}}}"}}]
    ),
}
OF_MARKDOWN = ("samples in trackers", "quickstart")


@pytest.mark.parametrize("place", SHOWN)
def test_what_is_shown_of_data_is_harmless(place: str) -> None:
    text = SHOWN[place]()
    assert text
    assert harmless(text) == text
    if place in OF_MARKDOWN:
        assert not re.search(r"<img|\]\(|!\[|`|http:", text)
    if place == "card":
        for line in text.splitlines():
            if "onerror" in line:
                assert re.search(r"(`+) .*onerror.* \1", line)
