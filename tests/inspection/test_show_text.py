"""Text of tokens: nothing lost, nothing added, no character torn apart; places of what truncation kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.data_helpers import byte_tokenizer, marked_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefopt.data.truncate import truncate
from prefopt.inspection.preview.cuts import kept_places
from prefopt.inspection.preview.text import MOST_TOKENS_OF_A_CHARACTER, decoded, text_spans
from prefopt.inspection.preview.tokens import Gap, Piece, pieces_of, shortened, vocabulary
from prefopt.types import TokenizedExample

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


def pieces_tokenizer() -> Any:
    """Pieces of words whose decoder tidies: it takes spaces away again, before marks and within "don't"."""
    words = ["[UNK]", "do", "##n", "'", "t", "n", "not", "go", "##ing", ".", ",", "!", "s", "I", "m"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def spaced_tokenizer() -> Any:
    """Spaces as marks and the rest as bytes, decoded as SentencePiece's tokenizers do: the first space is dropped."""
    made = marked_tokenizer()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.backend_tokenizer.decoder = decoders.Sequence(steps)
    return made


MADE = {
    "bytes": byte_tokenizer(),
    "marks": marked_tokenizer(),
    "spaces": spaced_tokenizer(),
    "words": word_tokenizer(),
    "pieces": pieces_tokenizer(),
}


def holds(ids: list[int], tokenizer: Any) -> None:
    """Spans follow on each other, none is empty, and their texts joined are the whole text."""
    spans = text_spans(ids, tokenizer)
    ends = [0, *(span.end for span in spans)]
    assert [span.begin for span in spans] == ends[:-1]
    assert ends[-1] == len(ids)
    assert all(span.begin < span.end for span in spans)
    assert "".join(span.text for span in spans) == decoded(ids, tokenizer)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_texts_of_spans_join_up(name: str, data: st.DataObject) -> None:
    """Of any ids whatever, those among them that are no text: bytes of which no character can be made."""
    size = len(MADE[name])
    holds(data.draw(st.lists(st.integers(0, size - 1), max_size=40)), MADE[name])


@pytest.mark.parametrize("folder", ["tokenizers/qwen2", "models/stories260K"])
def test_texts_of_real_tokenizers_join_up(folder: str, shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / folder)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40), st.text(max_size=60))
    def joined(ids: list[int], text: str) -> None:
        holds(ids, tokenizer)
        holds([*tokenizer(text.encode("utf-8", "ignore").decode())["input_ids"]], tokenizer)

    joined()


def test_a_character_of_several_tokens_is_one_span() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(f"a{FAMILY}b\u4f60")["input_ids"]
    spans = text_spans(ids, tokenizer)
    assert [(span.text, span.end - span.begin) for span in spans] == [
        ("a", 1),
        ("\U0001f468", 4),
        ("\u200d", 3),
        ("\U0001f469", 4),
        ("\u200d", 3),
        ("\U0001f467", 4),
        ("b", 1),
        ("\u4f60", 3),
    ]


def test_bytes_that_never_become_a_character_are_not_waited_for_without_end() -> None:
    tokenizer = byte_tokenizer()
    [first, *_] = tokenizer("\u4f60")["input_ids"]
    assert max(span.end - span.begin for span in text_spans([first] * 100, tokenizer)) == 16


def test_a_decoder_that_looks_far_back_is_followed() -> None:
    """One to which the whole text before matters: it counts its tokens. The spans then are of the whole text."""

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            return f"{len(ids)}" + "x" * len(ids)

    ids = [1, 2, 3]
    spans = text_spans(ids, Counting())
    assert "".join(span.text for span in spans) == "3xxx"
    assert spans[-1].end == 3


@pytest.mark.parametrize("name", ["bytes", "spaces"])
def test_the_work_grows_with_the_tokens_and_not_with_their_square(name: str) -> None:
    """Of tokenizers to which a token and the one before it matter, the whole text is decoded once."""
    lengths: list[int] = []

    class Watching:
        def decode(self, ids: list[int], **options: Any) -> str:
            lengths.append(len(ids))
            return MADE[name].decode(ids, **options)

    ids = MADE[name](f"the inn on the hill, {FAMILY} " * 20)["input_ids"]
    assert text_spans(ids, Watching())
    assert sum(length > 2 * MOST_TOKENS_OF_A_CHARACTER for length in lengths) == 1


def test_no_piece_goes_across_a_change() -> None:
    """A character of which one token is the prompt's: its text stands where it ends."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\u4f60b")["input_ids"]
    kinds: Any = ["prompt", "prompt", "trained", "untrained", "trained"]
    before, after = pieces_of(ids, kinds, tokenizer, vocabulary(tokenizer), 2)
    assert [(piece.text, len(piece.ids), piece.kind) for piece in before] == [("a", 1, "prompt"), ("", 1, "prompt")]
    assert [(piece.text, piece.kind) for piece in after] == [("", "trained"), ("\u4f60", "untrained"), ("b", "trained")]


def test_special_tokens_have_their_names() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    names = vocabulary(tokenizer).special
    assert [names[index] for index in range(4)] == ["bos", "eos pad", "special", "special"]
    assert len(names) == 4


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_kept_places_are_those_that_truncation_keeps(data: st.DataObject) -> None:
    """Ids that are the places themselves: what is found can be compared with what was kept."""
    num_prompt, num_completion = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 8))
    limit, mode = data.draw(st.integers(1, 20)), data.draw(st.sampled_from(["keep_start", "keep_end"]))
    ids = [*range(num_prompt + num_completion)]
    example = TokenizedExample(0, ids[:num_prompt], {"chosen": ids[num_prompt:]}, {"chosen": [True] * num_completion})
    cut = truncate(example, limit, mode)
    kept = [*cut.prompt_ids[cut.prompt_starts.get("chosen", 0) :], *cut.completion_ids["chosen"]]
    if len(cut.prompt_ids) <= limit:  # else all of the completion is gone, and the row left out
        assert [ids[place] for place in kept_places(ids, kept, mode)] == kept


def test_kept_places_are_at_the_side_that_was_kept() -> None:
    same = [7] * 6
    assert kept_places(same, [7, 7], "keep_start") == [0, 1]
    assert kept_places(same, [7, 7], "keep_end") == [4, 5]
    assert kept_places([1, 5, 6, 7, 2], [1, 7, 2], "keep_end") == [0, 3, 4]
    assert kept_places([1, 5, 6, 7, 2], [1, 5, 2], "keep_start") == [0, 1, 4]
    with pytest.raises(ValueError, match="no stretch"):
        kept_places([1, 2], [2, 1], "keep_start")


def test_long_cuts_are_shortened_on_the_far_side() -> None:
    cut = [Piece(str(index), (index,), "cut") for index in range(100)]
    kept = [Piece("k", (1,), "prompt")]
    assert shortened([*cut, *kept]) == [Gap(60, "cut"), *cut[60:], *kept]
    assert shortened([*kept, *cut]) == [*kept, *cut[:40], Gap(60, "cut")]
