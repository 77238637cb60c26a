"""Rows in every accepted format, and what is said about broken ones."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import assistant, user

from prefopt.data.schema import check_columns, parse_row
from prefopt.types import PAIR, TRIPLE, PreferenceExample, TokenizedExample


def parsed(row: dict[str, Any], branches: Any = PAIR) -> PreferenceExample:
    example = parse_row(row, 7, branches)
    assert isinstance(example, PreferenceExample)
    assert example.row == 7
    return example


def test_text_with_a_prompt() -> None:
    example = parsed({"prompt": "2+2=", "chosen": "4", "rejected": "5", "score": 1.0})
    assert (example.prompt, example.completions) == ("2+2=", {"chosen": "4", "rejected": "5"})
    assert not example.is_conversational


def test_text_with_the_prompt_inside() -> None:
    example = parsed({"chosen": "Sky? It is blue.", "rejected": "Sky? It is black."})
    assert example.prompt == "Sky? It is"
    assert example.completions == {"chosen": " blue.", "rejected": " black."}


def test_the_gold_completion_shares_the_prompt() -> None:
    row = {"chosen": "Q: x\nA: one", "rejected": "Q: x\nA: only", "reference": "Q: x\nA: first"}
    example = parsed(row, TRIPLE)
    assert example.prompt == "Q: x\nA:"
    assert example.completions["gold"] == " first"
    with pytest.raises(ValueError, match=r"row 7, column 'reference'.*does not begin with the implicit prompt"):
        parse_row({**row, "reference": "first"}, 7, TRIPLE)


def test_messages_with_the_prompt_inside() -> None:
    shared = [user("hi"), assistant("hello"), user("sky?")]
    example = parsed({"chosen": [*shared, assistant("blue")], "rejected": [*shared, assistant("red")]})
    assert example.prompt == shared
    assert example.completions == {"chosen": [assistant("blue")], "rejected": [assistant("red")]}


def test_each_side_keeps_a_message() -> None:
    longer = [user("hi"), assistant("hello"), user("sky?"), assistant("blue")]
    example = parsed({"chosen": longer, "rejected": longer[:2]})
    assert example.prompt == longer[:1]
    assert example.completions == {"chosen": longer[1:], "rejected": longer[1:2]}


def test_an_implicit_prompt_does_not_end_where_an_assistant_turn_follows_another() -> None:
    """A given prompt that ends in an assistant turn is continued; these are separate turns and stay so."""
    shared = [user("hi"), assistant("hello")]
    example = parsed({"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]})
    assert example.prompt == shared[:1]


def test_a_text_prompt_beside_messages_is_a_user_turn() -> None:
    example = parsed({"prompt": "sky?", "chosen": [assistant("blue")], "rejected": [assistant("red")]})
    assert example.prompt == [user("sky?")]


def test_a_text_prompt_that_the_messages_hold_already_is_not_doubled() -> None:
    row = {"prompt": "sky?", "chosen": [user("sky?"), assistant("a")], "rejected": [user("sky?"), assistant("b")]}
    example = parsed(row)
    assert example.prompt == [user("sky?")]
    assert example.completions["chosen"] == [assistant("a")]


def test_text_beside_a_prompt_of_messages_is_what_the_assistant_says() -> None:
    example = parsed({"prompt": [user("sky?")], "chosen": "blue", "rejected": "red"})
    assert example.completions == {"chosen": [assistant("blue")], "rejected": [assistant("red")]}


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompts(prompt: Any) -> None:
    completions = {"chosen": [assistant("a")], "rejected": [assistant("b")]} if prompt == [] else {}
    example = parsed({"prompt": prompt, "chosen": "a", "rejected": "b", **completions})
    assert example.prompt == prompt


@pytest.mark.parametrize("tools", [[{"type": "function"}], '[{"type": "function"}]'])
@pytest.mark.parametrize("kwargs", [{"enable_thinking": False, "other": None}, '{"enable_thinking": false}'])
def test_tools_and_template_options(tools: Any, kwargs: Any) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": tools, "chat_template_kwargs": kwargs}
    example = parsed(row)
    assert example.tools == [{"type": "function"}]
    assert example.chat_template_kwargs == {"enable_thinking": False}


def test_what_arrow_fills_with_none_is_taken_out() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}, "id": None}
    asking = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {"prompt": [{**user("hi"), "tool_calls": None}], "chosen": [asking], "rejected": [assistant("no")]}
    example = parsed(row)
    assert example.prompt == [user("hi")]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert example.completions["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [assistant("x")], "rejected": [assistant("y")]}
    assert parsed(row).prompt == [user("ab")]


def test_reference_log_probs() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1, "ref_rejected_logps": -2.5}
    assert parsed(row).ref_sum_logps == {"chosen": -1.0, "rejected": -2.5}


@pytest.mark.parametrize("suffix", ["_ids", "_input_ids"])
def test_token_ids_win_over_text(suffix: str) -> None:
    ids = {f"prompt{suffix}": [1, 2], f"chosen{suffix}": [3], f"rejected{suffix}": [4, 5], f"reference{suffix}": [6]}
    example = parse_row({**ids, "prompt": "x", "chosen": "y", "rejected": "z", "reference": None}, 3, TRIPLE)
    assert isinstance(example, TokenizedExample)
    assert example.prompt_ids == [1, 2]
    assert example.completion_ids == {"chosen": [3], "rejected": [4, 5], "gold": [6]}
    assert example.loss_masks == {"chosen": [True], "rejected": [True, True], "gold": [True]}


def test_token_ids_with_labels_hold_the_prompt() -> None:
    """TRL's CPO made rows of this kind: prompt and completion in one, -100 where nothing is trained on."""
    row = {
        "prompt_input_ids": [1, 2],
        "chosen_input_ids": [1, 2, 3, 4],
        "chosen_labels": [-100, -100, -100, 4],
        "rejected_input_ids": [1, 2, 5],
        "rejected_labels": [-100, -100, 5],
    }
    example = parse_row(row, 0, PAIR)
    assert isinstance(example, TokenizedExample)
    assert example.prompt_ids == [1, 2]
    assert example.completion_ids == {"chosen": [3, 4], "rejected": [5]}
    assert example.loss_masks == {"chosen": [False, True], "rejected": [True]}


BASE = {"prompt": "a", "chosen": "b", "rejected": "c"}
TOKENS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "column 'rejected': the column is missing"),
        ({**BASE, "chosen": None}, "column 'chosen': the value is None.*drop the row"),
        ({**BASE, "prompt": None}, "column 'prompt': the value is None"),
        ({**BASE, "rejected": 3.5}, "column 'rejected': expected text or a list of messages, got float 3.5.*Convert"),
        ({**BASE, "chosen": [assistant("x")]}, "some are text and some are messages"),
        ({**BASE, "prompt": [{"from": "human", "value": "x"}]}, r"column 'prompt\[0\]'.*no 'role'.*from, value"),
        ({**BASE, "prompt": ["x"]}, r"column 'prompt\[0\]': expected a message, got str 'x'"),
        ({**BASE, "prompt": [user(3)]}, "the content is int 3"),  # type: ignore[arg-type]
        ({**BASE, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"'prompt\[0\]'.*vision-related"),
        ({**BASE, "prompt": [{"role": "user", "content": [{"type": "odd"}]}]}, "a part that is no text"),
        ({**BASE, "image": object()}, "column 'image': the row has images.*vision-related data.*remove the column"),
        ({**BASE, "images": [object()]}, "column 'images': the row has images"),
        ({**BASE, "tools": "[{"}, "column 'tools': the text is not JSON"),
        ({**BASE, "tools": {"a": 1}}, "column 'tools': expected a list, got dict"),
        ({**BASE, "chat_template_kwargs": "[1]"}, "column 'chat_template_kwargs': expected a dict"),
        ({**BASE, "ref_chosen_logps": -1.0}, "column 'ref_rejected_logps': expected a number"),
        ({**BASE, "ref_chosen_logps": float("nan"), "ref_rejected_logps": 0}, "column 'ref_chosen_logps'"),
        ({k: v for k, v in TOKENS.items() if k != "prompt_ids"}, "column 'prompt_ids': the column is missing"),
        ({**TOKENS, "chosen_ids": [1.5]}, "column 'chosen_ids': expected token ids"),
        ({**TOKENS, "chosen_ids": [-100]}, "column 'chosen_ids': expected token ids"),
        ({**TOKENS, "chosen_labels": [1, 2], "rejected_labels": [3]}, "not as many labels as ids"),
    ],
)
def test_broken_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^row 7.*{message}"):
        parse_row(row, 7, PAIR)


def test_columns_are_checked_before_rows() -> None:
    check_columns(["chosen", "rejected", "x"], PAIR)
    check_columns(["chosen_ids", "rejected_input_ids", "prompt_ids"], PAIR)
    with pytest.raises(ValueError, match=r"no column 'rejected' \(columns: prompt, chosen, reject\).*mean 'reject'"):
        check_columns(["prompt", "chosen", "reject"], PAIR)
    with pytest.raises(ValueError, match="no column 'reference'"):
        check_columns(["chosen", "rejected"], TRIPLE)
