"""Cutting to max_length, each sequence as TRL's collator cuts it."""

from __future__ import annotations

from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.truncate import truncate, without_context_unscored
from prefopt.types import TokenizedExample


def example_of(prompt: int, chosen: int, rejected: int) -> TokenizedExample:
    """Tokens are numbered, so that each can be told from every other."""
    ids: dict[Any, list[int]] = {
        "chosen": list(range(100, 100 + chosen)),
        "rejected": list(range(200, 200 + rejected)),
    }
    masks: dict[Any, list[bool]] = {branch: [token % 3 != 0 for token in tokens] for branch, tokens in ids.items()}
    return TokenizedExample(0, list(range(prompt)), ids, masks)


@given(
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_each_sequence_is_a_slice_of_its_own(
    prompt: int, chosen: int, rejected: int, max_length: int, mode: Literal["keep_start", "keep_end"]
) -> None:
    whole = example_of(prompt, chosen, rejected)
    cut = truncate(whole, max_length, mode)
    kept = slice(0, max_length) if mode == "keep_start" else slice(-max_length, None)
    for branch, ids in whole.completion_ids.items():
        expected = [*whole.prompt_ids, *ids][kept]
        own_prompt = list(cut.prompt_ids)[cut.prompt_starts.get(branch, 0) :]
        if cut.completion_ids[branch]:
            assert [*own_prompt, *cut.completion_ids[branch]] == expected
        else:
            assert mode == "keep_start"
            assert prompt >= max_length
        assert cut.loss_masks[branch] == [token % 3 != 0 for token in cut.completion_ids[branch]]
    assert not cut.prompt_starts or min(cut.prompt_starts.values()) == 0


def test_no_limit_and_short_rows_change_nothing() -> None:
    whole = example_of(3, 2, 4)
    assert truncate(whole, None, "keep_end") is whole
    assert truncate(whole, 7, "keep_end") is whole


def test_a_first_token_without_context_is_not_scored() -> None:
    cut = truncate(example_of(2, 1, 5), 4, "keep_end")
    assert cut.prompt_starts == {"chosen": 0, "rejected": 2}
    scored = without_context_unscored(cut)
    assert scored.loss_masks["chosen"] == cut.loss_masks["chosen"]
    assert list(scored.loss_masks["rejected"]) == [False, *list(cut.loss_masks["rejected"])[1:]]
    empty = without_context_unscored(example_of(0, 2, 2))
    assert [mask[0] for mask in empty.loss_masks.values()] == [False, False]
