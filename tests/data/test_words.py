"""Texts tokenised by words: the ids are the tokenizer's own, and where that is not sure, texts stay whole."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from data_helpers import MARK, MARKED_MERGES, MARKING, MERGES, byte_tokenizer, marked_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from prefopt.data import words
from prefopt.data.encoding import TextEncoder
from prefopt.data.expressions import known_characters, python_expression
from prefopt.data.pieces import last_cut

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


def marked(*, added: tuple[Any, ...] = (), **options: Any) -> Any:
    tokenizer = marked_tokenizer(**options)
    tokenizer.add_tokens(list(added))
    return tokenizer


def metaspace(scheme: str, **options: Any) -> Any:
    return marked(normal=None, split=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), **options)


THINK = AddedToken("<think>", normalized=False)
SPACES = AddedToken("  ", normalized=True)
OVERLAPPING = (AddedToken("<|im", normalized=False), AddedToken("<think", normalized=True), THINK)

BY_WORDS: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "added tokens that overlap": lambda: byte_level(added=OVERLAPPING),
    "spaces as added tokens": lambda: byte_level(added=(SPACES, AddedToken("xx", normalized=True), THINK)),
    "llama3": lambda: byte_level(split(LLAMA3), BYTES_ALONE, normal=normalizers.NFC()),
    "llama3, inverted": lambda: byte_level(split(LLAMA3, "removed", True), BYTES_ALONE),
    "cases": lambda: byte_level(split(CASES), BYTES_ALONE, normal=normalizers.Sequence([])),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), GPT2, normal=normalizers.NFKC()),
    "numbers first, words after": lambda: byte_level(split(r"\p{N}{1,3}"), pre_tokenizers.Digits(), GPT2),
    "mark": marked,
    "mark, added tokens": lambda: marked(added=(THINK, AddedToken("[x]", normalized=False))),
    "mark, none in front": lambda: marked(normal=normalizers.Replace(" ", MARK)),
    "mark, letters beside others": lambda: marked(merges=[*MARKED_MERGES, ("a", "."), ("(", "in")]),
    "metaspace, first": lambda: metaspace("first", added=(THINK, AddedToken("[x]", normalized=True))),
    "metaspace, always": lambda: metaspace("always", added=(THINK,)),
    "metaspace, never": lambda: metaspace("never"),
}


@pytest.mark.parametrize("name", BY_WORDS)
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_words_give_the_ids_of_whole_texts(name: str, data: Any) -> None:
    tokenizer, encode = made(name)
    prompt, others = data.draw(TEXT), data.draw(st.lists(TEXT, min_size=1, max_size=2))
    texts = [prompt, *(prompt + other for other in others)]
    for special in (False, True):
        [(ids, other_ids)] = encode.families([(prompt, texts[1:])], add_special_tokens=special)
        assert [list(item) for item in (ids, *other_ids)] == tokenizer(texts, add_special_tokens=special)["input_ids"]
    assert [list(ids) for ids in encode(others)] == tokenizer(others, add_special_tokens=False)["input_ids"]


MADE: dict[str, tuple[Any, TextEncoder]] = {}


def made(name: str) -> tuple[Any, TextEncoder]:
    if name not in MADE:
        tokenizer = BY_WORDS[name]()
        MADE[name] = tokenizer, TextEncoder(tokenizer)
        assert MADE[name][1].by_words is not None
    return MADE[name]


def with_dropout() -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    return tokenizer


def that_splits_special_tokens() -> Any:
    tokenizer = byte_level()
    tokenizer.split_special_tokens = True
    return tokenizer


def of_its_own() -> Any:
    tokenizer = byte_level()

    class Own(type(tokenizer)):
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus([item.replace("on", "in") for item in text], **options)

    tokenizer.__class__ = Own
    return tokenizer


WHOLE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a token reaches over a cut": (lambda: byte_level(added=(AddedToken("on ", normalized=False),)), "on", " a"),
    "a token holds a cut": (lambda: byte_level(added=(AddedToken("on a", normalized=False),)), "on", " a"),
    "a token takes the space after it": (
        lambda: byte_level(added=(AddedToken("on", rstrip=True, normalized=False),)),
        "on",
        " a",
    ),
    "tokens of several words": (lambda: byte_level(BYTES_ALONE), "in", " a"),
    "other words than letters": (lambda: byte_level(split(r"[a-z]+ ?"), BYTES_ALONE), "in", " a"),
    "a space before every text": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a b", " in"),
    "another spelling": (lambda: byte_level(GPT2, normal=normalizers.Lowercase()), "A", "B"),
    "a mark within merged tokens": (lambda: marked(merges=[*MARKED_MERGES, ("n", MARK)]), "in", " a"),
    "a token that begins a word": (lambda: marked(added=(AddedToken("on", normalized=False),)), "a", " on"),
    "words of its own": (lambda: marked(split=pre_tokenizers.Whitespace(), normal=MARKING), "a", " on"),
    "chance": (with_dropout, "a", "b"),
    "special tokens as text": (that_splits_special_tokens, "<s>", "a"),
    "a tokenizer of its own": (of_its_own, "on", " on"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokenizers_whose_texts_stay_whole(name: str) -> None:
    make, prompt, rest = WHOLE[name]
    tokenizer = make()
    encode = TextEncoder(tokenizer)
    assert encode.by_words is None
    if name == "chance":
        return
    [(ids, [whole])] = encode.families([(prompt, [prompt + rest])], add_special_tokens=True)
    assert [list(ids), list(whole)] == tokenizer([prompt, prompt + rest])["input_ids"]


def test_real_tokenizers_have_words(qwen2: Any, stories: Any, ultrafeedback: list[dict[str, Any]]) -> None:
    for tokenizer in (qwen2, stories):
        encode = TextEncoder(tokenizer)
        assert encode.by_words is not None
        texts = [text for row in ultrafeedback[:60] for text in row.values()]
        assert [list(ids) for ids in encode(texts)] == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_what_an_earlier_call_left_behind_changes_nothing() -> None:
    """Truncation and padding stay on in the backend after a call with them; words beyond ASCII go through it."""
    for tokenizer in (byte_level(), byte_level(BYTES_ALONE)):
        expected = tokenizer(["é" * 9, "a"])["input_ids"]
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=8)
        [(first, [second])] = TextEncoder(tokenizer).families([("é" * 9, ["a"])], add_special_tokens=True)
        assert [list(first), list(second)] == expected


def test_what_is_remembered_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 20)
    encode = TextEncoder(byte_level())
    assert encode.by_words is not None
    num_fixed = len(encode.by_words.known)
    encode(["é" * 61, "a b"])
    assert set(encode.by_words.known) - set(encode.by_words.fixed) >= {"a", " b"}
    assert not any(len(word) > 60 for word in encode.by_words.known)
    encode([" ".join("abcdefghijklmnopqrst")])
    assert len(encode.by_words.known) == num_fixed
    assert [list(ids) for ids in encode(["a b"])] == encode.tokenizer(["a b"], add_special_tokens=False)["input_ids"]


def test_another_process_gets_the_tokenizer_alone() -> None:
    encode = TextEncoder(byte_level())
    encode(["a b"])
    assert set(vars(pickle.loads(pickle.dumps(encode)))) == {"tokenizer"}


def test_texts_are_cut_between_a_letter_and_a_space_that_a_letter_follows() -> None:
    assert last_cut("one two") == 3
    assert last_cut("one 2, 漢 f. g") == 0
    assert last_cut("где é") == 3
    assert last_cut("one two " + "1 " * 200) == 3


@pytest.mark.parametrize("form", [None, "NFC", "NFKD"])
@pytest.mark.parametrize("pattern", [LLAMA3, CASES], ids=["llama3", "cases"])
def test_both_engines_agree_on_every_known_character(pattern: str, form: str | None) -> None:
    """Each stands between letters, digits, spaces, signs and its own kind, and by itself."""
    forms = () if form is None else (form,)
    expression = python_expression(pattern, forms)
    assert expression is not None
    characters = [chr(code) for codes in known_characters(forms).values() for code in codes]
    text = "".join(f"a{c}a 1{c}1 {c} .{c}{c}A{c}\n" for c in characters)
    words = [word for word in expression.split(text) if word]
    assert words == [text[start:end] for _, (start, end) in split(pattern).pre_tokenize_str(text)]
    if form is not None:
        assert getattr(normalizers, form)().normalize_str(text) == text


@pytest.mark.parametrize(
    "pattern",
    [
        r"^a",
        r"a$",
        r"\p{Han}",
        r"[a[b]]",
        r"[a&&b]",
        r"\w",
        r"(?i:\p{L})",
        r"a{1,2}+",
        r"\h",
        r"(?<!a)b",
        r"(?m:a)",
        r"(a)\1",
        "a*",
        r"[\p{L}-z]",
    ],
)
def test_expressions_that_the_two_engines_may_read_differently(pattern: str) -> None:
    assert python_expression(pattern, ()) is None
