"""Texts tokenised in pieces: the ids are the tokenizer's own, and where that is not sure, texts stay whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from data_helpers import MARK, MERGES, byte_tokenizer, marked_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from prefopt.data.encoding import TextEncoder, last_cut

FRAGMENTS = (
    *(
        "the",
        " the end",
        "on",
        "in",
        "I'll",
        "IT'S",
        "aBc",
        "a",
        " x y",
        "  ",
        "   ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "\r\n",
    ),
    *(
        ".",
        ",",
        "!!",
        "?!",
        "(",
        ")",
        "/",
        "_",
        "1",
        "23",
        "4567",
        "3.14",
        "<s>",
        "</s>",
        "<|im_end|>",
        "<|im",
        "<unk>",
    ),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "漢字",
        "ß",
        "\u017f",
        "İ",
        "\u2013",
        "\u00a0",
        "\u3000",
        "\u200b",
        "😀",
        "²",
        "ﬁ",
        "<think>",
    ),
    *(
        "größe",
        "Жук",
        " в лесу",
        "Ω",
        "½",
        "Ⅷ",
        "٣",
        "\u02bcs",
        "\u2019s",
        "한",
        "\u212a",
        "\u212b",
        "ŉ",
        "ǅ",
        "שלום",
        "\u2028",
    ),
    *("\x00", "\x0b", "\x1c", "\x7f", "\x85", MARK, MARK + MARK, f"a{MARK}b", "<0x0A>", "[x]", "&&", "~~", "#", "xx"),
)
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from([" ", " a", "on "]), max_size=14).map("".join)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CASES = (  # words by upper and lower case, as o200k has them
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(*steps: Any, normal: Any = None, added: tuple[Any, ...] = ()) -> Any:
    """A byte-level tokenizer with these steps before its last, or with those of GPT-2."""
    merges = [*MERGES, ("a", "b"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("!", "!"), ("Ġa", "Ġ"), ("n", "Ġ")]
    tokenizer = byte_tokenizer(bos=True, auto_eos=True, merges=merges)
    if normal is not None:
        tokenizer.backend_tokenizer.normalizer = normal
    if steps:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.add_tokens(list(added))
    return tokenizer


THINK = AddedToken("<think>", normalized=False)
SPACES = AddedToken("  ", normalized=True)
OVERLAPPING = (AddedToken("<|im", normalized=False), AddedToken("<think", normalized=True), THINK)


def that_splits_special_tokens() -> Any:
    tokenizer = byte_level()
    tokenizer.split_special_tokens = True
    return tokenizer


CUT: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "added tokens that overlap": lambda: byte_level(added=OVERLAPPING),
    "spaces as added tokens": lambda: byte_level(added=(SPACES, AddedToken("xx", normalized=True), THINK)),
    "llama3": lambda: byte_level(split(LLAMA3), BYTES_ALONE, normal=normalizers.NFC()),
    "llama3, inverted": lambda: byte_level(split(LLAMA3, "removed", True), BYTES_ALONE),
    "cases": lambda: byte_level(split(CASES), BYTES_ALONE, normal=normalizers.Sequence([])),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), GPT2, normal=normalizers.NFKC()),
    "numbers first, words after": lambda: byte_level(split(r"\p{N}{1,3}"), pre_tokenizers.Digits(), GPT2),
    "decomposed": lambda: byte_level(GPT2, normal=normalizers.NFKD()),
    "special tokens as text": that_splits_special_tokens,
}


@pytest.mark.parametrize("name", CUT)
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_pieces_give_the_ids_of_whole_texts(name: str, data: Any) -> None:
    tokenizer, encode = made(name)
    prompt, others = data.draw(TEXT), data.draw(st.lists(TEXT, min_size=1, max_size=2))
    texts = [prompt, *(prompt + other for other in others)]
    for special in (False, True):
        [(ids, other_ids)] = encode.families([(prompt, texts[1:])], add_special_tokens=special)
        assert [list(item) for item in (ids, *other_ids)] == tokenizer(texts, add_special_tokens=special)["input_ids"]
    assert [list(ids) for ids in encode(others)] == tokenizer(others, add_special_tokens=False)["input_ids"]


@cache
def made(name: str) -> tuple[Any, TextEncoder]:
    tokenizer = CUT[name]()
    encode = TextEncoder(tokenizer)
    assert encode.can_cut
    return tokenizer, encode


def of_its_own() -> Any:
    tokenizer = byte_level()

    class Own(type(tokenizer)):
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus([item.replace("on", "in") for item in text], **options)

    tokenizer.__class__ = Own
    return tokenizer


WHOLE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a token reaches over a cut": (lambda: byte_level(added=(AddedToken("on ", normalized=False),)), "a on", " a"),
    "a token holds a cut": (lambda: byte_level(added=(AddedToken("on a", normalized=False),)), "a on", " a"),
    "a token takes the space after it": (
        lambda: byte_level(added=(AddedToken("on", rstrip=True, normalized=False),)),
        "a on",
        " a",
    ),
    "tokens of several words": (lambda: byte_level(BYTES_ALONE), "a in", " a"),
    "other words than letters": (lambda: byte_level(split(r"[a-z]+ ?"), BYTES_ALONE), "a in", " a"),
    "capitals of several words": (lambda: byte_level(split(r"[A-Z ]+"), BYTES_ALONE), "A B", " C"),
    "a space before every text": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a b", " in"),
    "another spelling": (lambda: byte_level(GPT2, normal=normalizers.Lowercase()), "A", "B"),
    "a mark instead of a space": (marked_tokenizer, "a b", " on"),
    "a tokenizer of its own": (of_its_own, "on a", " on"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokenizers_whose_texts_stay_whole(name: str) -> None:
    make, prompt, rest = WHOLE[name]
    tokenizer = make()
    encode = TextEncoder(tokenizer)
    assert not encode.can_cut
    [(ids, [whole])] = encode.families([(prompt, [prompt + rest])], add_special_tokens=True)
    assert [list(ids), list(whole)] == tokenizer([prompt, prompt + rest])["input_ids"]


def test_real_tokenizers(qwen2: Any, stories: Any, ultrafeedback: list[dict[str, Any]]) -> None:
    assert TextEncoder(qwen2).can_cut
    assert not TextEncoder(stories).can_cut
    for tokenizer in (qwen2, stories):
        families = [(row["prompt"], [row["prompt"] + row["chosen"]]) for row in ultrafeedback[:60]]
        ids = TextEncoder(tokenizer).families(families, add_special_tokens=False)
        texts = [text for prompt, [whole] in families for text in (prompt, whole)]
        found = [list(item) for prompt, [whole] in ids for item in (prompt, whole)]
        assert found == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_what_an_earlier_call_left_behind_changes_nothing() -> None:
    """Truncation and padding stay on in the backend after a call with them."""
    for tokenizer in (byte_level(), byte_level(BYTES_ALONE)):
        expected = tokenizer(["é" * 9, "a"])["input_ids"]
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=8)
        [(first, [second])] = TextEncoder(tokenizer).families([("é" * 9, ["a"])], add_special_tokens=True)
        assert [list(first), list(second)] == expected


def test_texts_are_cut_between_a_letter_and_a_space_that_a_letter_follows() -> None:
    assert last_cut("one two") == 3
    assert last_cut("one 2, 漢 f. g") == 0
    assert last_cut("где é") == 3
    assert last_cut("one two " + "1 " * 200) == 3
