"""What `measure` finds, against sets whose answers are known and against comparisons of all rows with all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.inspection.statistics import Statistics, measure
from prefopt.inspection.statistics.findings import findings
from prefopt.inspection.statistics.lengths import distribution
from prefopt.inspection.statistics.sketches import ALIKE, PIECE, alike, sketch
from prefopt.types import PAIR, TRIPLE

FOUR_DEVIATIONS = 4 * (0.25 / 120) ** 0.5
"""Of a share that is estimated from 120 independent samples."""
WORDS = [
    f"{first}{second}" for first in ("lum", "ter", "van", "sol", "mir") for second in ("o", "a", "ix", "ent", "ul")
]


def rows_of(*rows: tuple[Any, Any, Any]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def measured(*rows: tuple[Any, Any, Any], **options: Any) -> Statistics:
    return measure(rows_of(*rows), PAIR, name="train", **options)


def sentence(seed: int, length: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


# -- rows that say the same ----------------------------------------------------------------------------------------


def test_a_set_whose_dirt_is_known() -> None:
    found = measured(
        ("What?", "yes", "no"),
        ("Why?", "so", "so"),  # identical
        ("What?", "yes", "no"),  # once more
        ("What?", "no", "yes"),  # the other way round
        ("How?", "", "well"),  # empty
        ("What?", "yes", "maybe"),  # the prompt alone is known
        ("How?", "  ", "well"),  # empty but for white space
    )
    assert found.duplicates.pairs == ((0, 2),)
    assert found.duplicates.contradictory == ((0, 2, 3),)
    assert found.duplicates.prompts == ((0, 2, 3, 5), (4, 6))
    assert found.preparation.skipped == {"chosen equal to rejected": (1,), "empty completion": (4, 6)}
    assert (found.num_rows, found.preparation.num_kept) == (7, 4)
    said = [line.text + line.rows for line in findings(found)]
    assert "1 of 7 rows (14 %) is an earlier row once more: same prompt, same completions.rows 0 = 2" in said
    assert "2 of 7 rows (29 %) are left out: empty completion.rows 4, 6" in said
    assert any(line.startswith("3 of 7 rows (43 %) are contradicted") for line in said)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(["a", "b", ""])] * 3), min_size=1, max_size=12))
def test_duplicates_are_those_of_a_comparison_of_all_rows_with_all(rows: list[tuple[str, str, str]]) -> None:
    found = measured(*rows).duplicates

    def groups(same: Any) -> set[tuple[int, ...]]:
        numbers = range(len(rows))
        sets = {tuple(j for j in numbers if same(rows[i], rows[j])) for i in numbers}
        return {group for group in sets if len(group) > 1}

    assert set(found.pairs) == groups(lambda one, other: one == other)
    assert set(found.prompts) == groups(lambda one, other: one[0] == other[0])
    exchanged = {(prompt, rejected, chosen) for prompt, chosen, rejected in rows if chosen != rejected}
    disputed = {number for number, row in enumerate(rows) if row in exchanged}
    assert {row for group in found.contradictory for row in group} == disputed


def test_what_a_row_is_about_tells_it_from_others() -> None:
    """Tools, images, the gold completion and how text is cut into prompt and completion all count."""
    tool = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    pair = {"prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
    talk = {"prompt": [{"role": "user", "content": "Hi"}], **{side: [said(side)] for side in ("chosen", "rejected")}}
    sets: list[tuple[list[dict[str, Any]], tuple[Any, ...]]] = [
        ([pair, {**pair, "prompt": "What is this", "chosen": "?A cat."}], PAIR),
        ([{**talk, "tools": None}, {**talk, "tools": tool}], PAIR),
        ([{**talk, "image": {"bytes": one, "path": None}} for one in (b"cat", b"dog")], PAIR),
        ([{**pair, "reference": one} for one in ("A cat", "A kitten")], TRIPLE),
    ]
    for rows, branches in sets:
        assert measure(Dataset.from_list(rows), branches, name="train").duplicates.pairs == ()
        assert measure(Dataset.from_list([rows[1]] * 2), branches, name="train").duplicates.pairs == ((0, 1),)


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


# -- rows that say nearly the same ---------------------------------------------------------------------------------


def pieces(text: str) -> set[bytes]:
    content = " ".join(text.lower().split()).encode()
    return {content[start : start + PIECE] for start in range(max(len(content) - PIECE + 1, 1))}


def jaccard(one: str, other: str) -> float:
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


@pytest.mark.parametrize("kept", [0, 40, 70, 90, 97, 100])
def test_a_sketch_estimates_what_two_texts_share(kept: int) -> None:
    words = sentence(1, 600).split()
    other = sentence(2, 600).split()
    cut = len(words) * kept // 100
    one, changed = " ".join(words), " ".join([*words[:cut], *other[cut:]])
    estimate = float((sketch(one) == sketch(changed)).mean())
    assert estimate == pytest.approx(jaccard(one, changed), abs=FOUR_DEVIATIONS)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [sentence(seed, 150) for seed in range(300)]
    words = texts[7].split()
    texts += [" ".join(words[:-2]), " ".join([*words[:60], "indeed", *words[61:]]), texts[8].upper() + " \n"]
    groups = alike(np.stack([sketch(text) for text in texts]))
    assert groups == [(7, 300, 301), (8, 302)]
    assert min(jaccard(texts[7], texts[number]) for number in (300, 301)) > ALIKE


def test_exact_copies_are_not_near_duplicates_too() -> None:
    long = sentence(1, 80)
    found = measured(("Q", long, "no"), ("Q", long, "no"), ("Q", long + " indeed", "no"), ("R", sentence(2, 80), "no"))
    assert found.duplicates.pairs == ((0, 1),)
    assert found.duplicates.near == ((0, 2),)


def test_short_and_empty_texts_have_sketches() -> None:
    assert (sketch("") == sketch("  \n")).all()
    assert (sketch("hi") == sketch("HI")).all()
    assert not (sketch("hi") == sketch("no")).any()


# -- lengths -------------------------------------------------------------------------------------------------------


def test_lengths_by_hand() -> None:
    found = measured(("one two", "three", "four five six"), ("a b c d", "ee ff", "g"))
    words, characters = found.lengths["words"], found.lengths["characters"]
    assert [words[part].mean for part in ("prompt", "chosen", "rejected")] == [3.0, 1.5, 2.0]
    assert [characters[part].largest for part in ("prompt", "chosen", "rejected")] == [7, 5, 13]
    assert words["longest sequence"].median == (5 + 6) / 2  # 2 + 3 and 4 + 2
    assert words["whole pair"].median == (6 + 7) / 2
    assert "tokens" not in found.lengths


def test_a_distribution_by_hand() -> None:
    found = distribution(list(range(1, 101)))
    assert (found.mean, found.median, found.largest) == (50.5, 50.5, 100)
    assert (found.p90, found.p99) == pytest.approx((90.1, 99.01))
    assert sum(found.counts) == found.num_rows == 100
    assert sum(distribution([]).counts) == distribution([]).num_rows == 0


def test_longer_is_chosen_by_hand() -> None:
    """Differences of 2, 2, 0 and -1 characters; the identical pair and the empty one do not count."""
    rows = [("Q", "abcd", "ab"), ("R", "abc", "a"), ("Q", "ab", "cd"), ("Q", "a", "bc")]
    found = measured(*rows, ("Q", "same", "same"), ("Q", "long", ""))
    assert found.bias is not None
    assert (found.bias.share_longer, found.bias.share_equal) == (0.5, 0.25)
    assert (found.bias.median_difference, found.bias.unit) == (1.0, "characters")
    assert sum(found.bias.counts) == 4


@pytest.mark.parametrize(("longer", "is_said"), [(5, False), (7, True)])
def test_a_bias_to_length_is_said(longer: int, is_said: bool) -> None:
    rows = [("Q", f"{n} longer answer", "short") for n in range(longer)]
    rows += [("Q", "short", f"{n} longer answer") for n in range(10 - longer)]
    assert is_said == any("longer completion" in line.text for line in findings(measured(*rows)))


# -- what rows are made of -----------------------------------------------------------------------------------------


def test_conversations_by_hand() -> None:
    system, user, reply = said("Be kind.", "system"), said("Hi", "user"), said("Hello")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [
        {"prompt": [user], "chosen": [reply], "rejected": [said("No")], "tools": None},
        {"prompt": [system, user, reply, user], "chosen": [reply], "rejected": [said("No")], "tools": tools},
        {"prompt": [system, user], "chosen": [reply], "rejected": [said("Not")], "tools": None},
    ]
    found = measure(Dataset.from_list(rows), PAIR, name="train")
    talks = found.conversations
    assert talks is not None
    assert (talks.turns, talks.roles) == ({1: 2, 2: 1}, {"assistant": 3, "user": 3, "system": 2})
    assert (talks.with_system, talks.num_system_prompts, talks.with_tools) == ((1, 2), 1, (1,))
    assert found.formats == {"messages, prompt in its own column": 3}


def test_formats_and_columns() -> None:
    text = {"prompt": "Q", "chosen": "yes", "rejected": "no", "source": "web"}
    implicit = {"chosen": "Q? yes", "rejected": "Q? no"}
    ranked = {"prompt": "Q", "completions": ["best", "good", "bad"]}
    tokens = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    ranks = ("chosen", "rejected", "rank_3")
    expected = ["text, prompt in its own column", "text, prompt within the completions"]
    for row, form in zip((text, implicit), expected, strict=True):
        assert measure(Dataset.from_list([row]), PAIR, name="train").formats == {form: 1}
    assert measure(Dataset.from_list([text]), PAIR, name="train").unused == ("source",)
    found = measure(Dataset.from_list([ranked]), ranks, name="train")
    assert found.formats == {"ranked completions of text": 1}
    assert list(found.lengths["characters"])[:4] == ["prompt", "chosen", "rejected", "rank_3"]
    assert measure(Dataset.from_list([tokens]), PAIR, name="train").formats == {"token ids": 1}


def test_images_are_counted_unopened() -> None:
    rows = [
        {"prompt": [said("Look", "user")], "chosen": [said("a")], "rejected": [said("b")], "images": images}
        for images in ([{"bytes": b"no picture", "path": None}], [])
    ]
    found = measure(Dataset.from_list(rows), PAIR, name="train")
    assert (found.with_images, found.broken) == ((0,), ())


# -- broken rows, samples, streams ---------------------------------------------------------------------------------


def test_broken_rows_are_named_and_the_others_counted() -> None:
    found = measured(("Q", "yes", "no"), ("Q", None, "no"), ("Q", "so", "no"))
    assert [row.row for row in found.broken] == [1]
    assert "row 1, column 'chosen': the value is None" in found.broken[0].message
    assert (found.num_rows, found.preparation.num_kept) == (3, 2)
    worst = findings(found)[0]
    assert (worst.level, worst.rows) == ("bad", "row 1")
    numbers = measure(Dataset.from_dict({"prompt": ["Q"], "chosen": [3], "rejected": ["no"]}), PAIR, name="train")
    assert "expected text or a list of messages, got int 3" in numbers.broken[0].message


@pytest.mark.parametrize("empty", [Dataset.from_list([]), Dataset.from_dict({"chosen": [], "rejected": []})])
def test_no_rows_and_a_missing_column_are_errors(empty: Dataset) -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        measure(empty, PAIR, name="train")
    with pytest.raises(ValueError, match="no column 'rejected'"):
        measure(Dataset.from_list([{"chosen": "a", "refused": "b"}]), PAIR, name="train")


def numbered(count: int) -> list[tuple[str, str, str]]:
    return [(f"Q{number}", "no" if number == 9 else f"a{number}", "no") for number in range(count)]


def test_a_sample_is_evenly_spaced_and_keeps_the_numbers_of_rows() -> None:
    found = measured(*numbered(10), max_rows=4)
    assert found.sample == "4 of 10 rows, evenly spaced"
    assert found.num_rows == 4
    assert found.preparation.skipped == {"chosen equal to rejected": (9,)}
    assert measured(*numbered(10), max_rows=10).sample == ""


@pytest.mark.parametrize(("limit", "rows", "sample"), [(4, 4, "the first 4 rows of a stream"), (50, 10, "")])
def test_a_stream_is_read_to_the_limit(limit: int, rows: int, sample: str) -> None:
    read: list[int] = []

    def endless() -> Any:
        for number, row in enumerate(rows_of(*numbered(10))):
            read.append(number)
            yield row

    found = measure(IterableDataset.from_generator(endless), PAIR, name="train", max_rows=limit)
    assert (found.num_rows, found.sample) == (rows, sample)


def test_progress_goes_up_to_all_rows() -> None:
    seen: list[int] = []
    measured(*numbered(300), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 300
