"""Token ids: special tokens once, the cut where tokenisations part, templates as they render."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import CHATML, LLAMA, TOOLS, assistant, byte_tokenizer, prepared, user
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.encoding import TextEncoder
from prefopt.data.render import tokenize_examples
from prefopt.data.schema import parse_row
from prefopt.types import PAIR, PreferenceExample, TokenizedExample

TEXT = st.text(st.sampled_from("abinotl THE.\n'1é漢\u0301"), max_size=20)


def tokenized(row: dict[str, Any], tokenizer: Any) -> TokenizedExample:
    example = parse_row(row, 0, PAIR)
    assert isinstance(example, PreferenceExample)
    return tokenize_examples([example], tokenizer, TextEncoder(getattr(tokenizer, "tokenizer", tokenizer)))[0][0]


def texts(example: TokenizedExample, tokenizer: Any) -> tuple[str, str, str]:
    sides = (example.prompt_ids, example.completion_ids["chosen"], example.completion_ids["rejected"])
    prompt, chosen, rejected = (tokenizer.decode(list(ids)) for ids in sides)
    return prompt, chosen, rejected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("auto_eos", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_bos_and_eos_stand_once(bos: bool, auto_eos: bool, written: bool) -> None:
    """Whether the tokenizer writes them, the text has them already, or neither."""
    tokenizer = byte_tokenizer(bos=bos, auto_eos=auto_eos)
    start = "<s>" if written and bos else ""
    end = "</s>" if written else ""
    example = tokenized({"prompt": f"{start}Hi", "chosen": f" you{end}", "rejected": f" me{end}"}, tokenizer)
    assert texts(example, tokenizer) == ("<s>Hi" if bos else "Hi", " you</s>", " me</s>")


def test_a_tokenizer_without_eos_ends_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert texts(tokenized({"prompt": "Hi", "chosen": " a", "rejected": " b"}, tokenizer), tokenizer)[1] == " a"


def test_an_empty_prompt_is_the_bos() -> None:
    for row in (
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ):
        tokenizer = byte_tokenizer(bos=True, template=LLAMA)
        [kept] = prepared([row], tokenizer)
        assert kept["prompt_ids"] == [tokenizer.bos_token_id]
        assert tokenizer.decode(kept["chosen_ids"]).strip() == "a</s>"
        assert kept["chosen_mask"][-2:] == [True, True]


def test_an_empty_prompt_is_the_bos_also_where_the_tokenizer_adds_none() -> None:
    """GPT-2's kind: it has a BOS and writes it nowhere; generation from nothing starts with it."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<s>"
    [kept] = prepared([{"prompt": "", "chosen": "a", "rejected": "b"}], tokenizer)
    assert tokenizer.decode(kept["prompt_ids"]) == "<s>"
    assert tokenizer.decode(kept["chosen_ids"]) == "a</s>"
    [kept] = prepared([{"prompt": "x", "chosen": "a", "rejected": "b"}], tokenizer)
    assert tokenizer.decode(kept["prompt_ids"]) == "x"


def test_an_empty_prompt_without_a_bos_leaves_the_first_token_unscored() -> None:
    [kept] = prepared([{"prompt": "", "chosen": "xy", "rejected": "z"}], byte_tokenizer())
    assert kept["prompt_ids"] == []
    assert kept["chosen_mask"] == [False, True, True]
    assert kept["rejected_mask"] == [False, True]


def test_an_empty_conversation_trains_on_the_assistant_alone() -> None:
    """The header of the first turn is no part of what the assistant says."""
    tokenizer = byte_tokenizer()
    [kept] = prepared([{"prompt": [], "chosen": [assistant("xy")], "rejected": [assistant("z")]}], tokenizer)
    said = [token for token, trained in zip(kept["chosen_ids"], kept["chosen_mask"], strict=True) if trained]
    assert tokenizer.decode(said) == "xy<|im_end|>\n"


def test_the_completion_starts_where_tokens_merge(caplog: pytest.LogCaptureFixture) -> None:
    """ "t" and "he" become one token "the": it belongs to the completion, of both sides."""
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "is t", "chosen": "he", "rejected": "o"},
        {"prompt": "is ", "chosen": "x", "rejected": "y"},
        {"prompt": "is t", "chosen": "he", "rejected": "a"},
    ]
    kept = prepared(rows, tokenizer)
    assert [tokenizer.decode(row["prompt_ids"]) for row in kept] == ["is", "is ", "is"]
    assert tokenizer.decode(kept[0]["chosen_ids"]) == " the</s>"
    assert tokenizer.decode(kept[0]["rejected_ids"]) == " to</s>"
    merged = [record.message for record in caplog.records if "merge" in record.message]
    assert len(merged) == 1
    assert "in 2 of 3 rows" in merged[0]


def test_conversations_are_what_the_template_renders() -> None:
    tokenizer = byte_tokenizer(bos=True, auto_eos=True, template=CHATML)
    row = {"prompt": [user("Hi")], "chosen": [assistant("you")], "rejected": [assistant("me")]}
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts(tokenized(row, tokenizer), tokenizer) == (prompt, "you<|im_end|>\n", "me<|im_end|>\n")


def test_a_prompt_that_ends_in_an_assistant_turn_is_continued() -> None:
    tokenizer = byte_tokenizer()
    row = {"prompt": [user("2+2?"), assistant("It is")], "chosen": [assistant(" 4")], "rejected": [assistant(" 5")]}
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert texts(tokenized(row, tokenizer), tokenizer) == (prompt, " 4<|im_end|>\n", " 5<|im_end|>\n")


def test_a_closed_assistant_turn_before_other_turns() -> None:
    tokenizer = byte_tokenizer()
    shared = [user("Hi"), assistant("Hello")]
    row = {"chosen": [*shared, user("a"), assistant("b")], "rejected": [*shared, user("c"), assistant("d")]}
    example = tokenized(row, tokenizer)
    prompt, chosen, _ = texts(example, tokenizer)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert chosen == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


def test_tools_options_and_calls_reach_the_template() -> None:
    """Arguments that are JSON text, as Arrow needs them, are objects for the template."""
    tokenizer = byte_tokenizer(template=TOOLS + "{{ note }}")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "prompt": [user("1+1?")],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [assistant("3")],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "chat_template_kwargs": {"note": "!"},
    }
    prompt, chosen, _ = texts(tokenized(row, tokenizer), tokenizer)
    assert prompt.startswith("<|im_start|>system\nTools: add <|im_end|>\n")
    assert chosen == '<call>add {"a": 1}</call><|im_end|>\n!'


def test_a_template_that_takes_arguments_as_text() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ '>' + c.function.arguments }}{% endfor %}.{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {
        "prompt": [user("x")],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [assistant("no")],
    }
    tokenizer = byte_tokenizer(template=template)
    assert texts(tokenized(row, tokenizer), tokenizer)[1] == '>{"a": 1}.'


def test_template_errors_name_the_row() -> None:
    rows = [
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"prompt": [user("bad")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ]
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no such thing') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="train data, row 1, column 'chosen': the chat template failed: no such thing"):
        prepared(rows, byte_tokenizer(template=template))
    with pytest.raises(ValueError, match=r"row 0.*the tokenizer has no chat template.*Set"):
        prepared(rows, byte_tokenizer(template=None))


def test_rows_are_rendered_together_and_alone_alike() -> None:
    """Rows for which the template is given more than messages stand between others, and one continues its prompt."""
    template = CHATML + "{% if note %}({{ note }}){% endif %}"
    plain = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    continued = {**plain, "prompt": [user("a"), assistant("I ")]}
    examples = [parse_row(row, 0, PAIR) for row in (plain, {**plain, "chat_template_kwargs": {"note": "x"}}, continued)]
    examples += [parse_row({**plain, "prompt": [], "chosen": [user("d"), assistant("e")]}, 0, PAIR), examples[0]]
    tokenizer = byte_tokenizer(template=template)
    encode = TextEncoder(tokenizer)
    together = tokenize_examples(examples, tokenizer, encode)  # type: ignore[arg-type]
    assert together == [tokenize_examples([example], tokenizer, encode)[0] for example in examples]  # type: ignore
    assert texts(together[1][0], tokenizer)[1] == "b<|im_end|>\n(x)"


def test_a_tokenizer_with_its_own_way_of_rendering_is_asked_for_each() -> None:
    tokenizer: Any = byte_tokenizer()

    class Own(type(tokenizer)):
        def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
            assert isinstance(conversation[0], dict), "this one takes no several conversations"
            return super().apply_chat_template(conversation, **options)

    tokenizer.__class__ = Own
    row = {"prompt": [user("Hi")], "chosen": [assistant("you")], "rejected": [assistant("me")]}
    assert len(prepared([row, row], tokenizer)) == 2


def test_a_processor_gives_the_template_parts() -> None:
    class Processor:
        tokenizer = byte_tokenizer(template=None)
        chat_template = CHATML.replace("message.content", "message.content[0].text")

    row = {"prompt": [user("Hi")], "chosen": [assistant("you")], "rejected": [assistant("me")]}
    example = tokenized(row, Processor())
    assert texts(example, Processor.tokenizer)[1] == "you<|im_end|>\n"


@settings(deadline=None, max_examples=100)
@given(TEXT, TEXT.filter(str.strip), TEXT.filter(str.strip), st.booleans())
def test_prompt_and_completion_come_back(prompt: str, chosen: str, rejected: str, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    example = tokenized({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer)
    for branch, completion in (("chosen", chosen), ("rejected", rejected)):
        whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        assert [*example.prompt_ids, *example.completion_ids[branch]] == whole
        assert tokenizer.decode(whole) == ("<s>" if bos else "") + prompt + completion + "</s>"
    assert list(example.prompt_ids) == tokenizer(prompt)["input_ids"][: len(example.prompt_ids)]
