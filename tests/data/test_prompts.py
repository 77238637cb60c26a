"""The end of an implicit prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.prompts import common_prefix_length, shared_text

WORDS = st.lists(st.sampled_from(["the", "sky", "is", "blue", "black", "b", "?", "\n"]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (["Sky? It is blue.", "Sky? It is black."], "Sky? It is"),
        (["Sky?\nblue", "Sky?\nred"], "Sky?\n"),
        (["ab", "cd"], ""),
        (["blue", "black"], ""),
        (["a b", "a b c"], "a"),
        (["a b c", "a b d", "a x"], "a"),
    ],
)
def test_text_is_cut_before_a_word(texts: list[str], prompt: str) -> None:
    assert texts[0][: shared_text(texts)] == prompt


@given(WORDS, WORDS, WORDS)
def test_the_prompt_is_shared_and_leaves_whole_words(start: list[str], one: list[str], other: list[str]) -> None:
    texts = [" ".join(start + one), " ".join(start + other)]
    length = shared_text(texts)
    assert texts[0][:length] == texts[1][:length]
    for text in texts:
        assert text[length:]
        assert not (length and text[length - 1].isalnum() and text[length].isalnum())


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    length = common_prefix_length(first, second)
    assert first[:length] == second[:length]
    assert length in (len(first), len(second)) or first[length] != second[length]
