"""The generated preference set: answers checked both ways, split, seeds."""

from __future__ import annotations

import itertools

import pytest

from prefopt.quickstart import check, preference_set
from prefopt.quickstart.task import ASKS, WORDS, Request, is_held_out, parse

WORKED = {
    "Sort ascending": ("owl cat bee", "bee cat owl", "owl cat bee"),
    "Sort descending": ("bee owl cat", "owl cat bee", "bee cat owl"),
    "Repeat forwards": ("owl bee cat", "owl bee cat", "cat bee owl"),
    "Repeat backwards": ("owl bee cat", "cat bee owl", "owl bee cat"),
    "Write in capitals": ("owl bee cat", "OWL BEE CAT", "owl bee cat"),
    "Write in small letters": ("owl bee cat", "owl bee cat", "OWL BEE CAT"),
}


def words_of(prompt: str) -> tuple[str, ...]:
    return parse(prompt).words


def test_every_request_has_a_worked_answer():
    assert WORKED.keys() == ASKS.keys()


@pytest.mark.parametrize("ask", WORKED)
def test_answers_and_checker_agree_with_worked_ones(ask):
    words, right, wrong = WORKED[ask]
    request = Request(ask, tuple(words.split()))
    assert request.prompt == f"{ask}: {words}\nAnswer:"
    assert (request.right, request.wrong) == (f" {right}", f" {wrong}")
    assert check(request.prompt, right)
    assert not check(request.prompt, wrong)


@pytest.mark.parametrize("answer", ["", "bee cat", "bee cat owl owl", "bee, cat, owl", "BEE CAT OWL", "bee owl cat"])
def test_checker_takes_nothing_but_the_answer(answer):
    assert not check("Sort ascending: owl cat bee\nAnswer:", answer)


@pytest.mark.parametrize(
    "prompt", ["Sort: owl cat\nAnswer:", "Sort ascending: owl cat", "Sort ascending: owl\nAnswer:", ""]
)
def test_checker_refuses_what_is_no_request(prompt):
    with pytest.raises(ValueError, match="not a request of the quickstart"):
        check(prompt, "owl cat")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rows_are_checked_both_ways_and_different(split):
    rows = preference_set(split, 600, seed=3)
    assert rows.column_names == ["prompt", "chosen", "rejected"]
    assert len(set(rows["prompt"])) == 600
    for row in rows:
        assert check(row["prompt"], row["chosen"])
        assert not check(row["prompt"], row["rejected"])


def test_every_request_is_asked_equally_often():
    asks = [parse(prompt).ask for prompt in preference_set("held_out", 60)["prompt"]]
    assert {ask: asks.count(ask) for ask in ASKS} == dict.fromkeys(ASKS, 10)


def test_held_out_sets_of_words_are_in_no_training_set():
    train = {frozenset(words_of(p)) for seed in range(3) for p in preference_set("train", 1200, seed=seed)["prompt"]}
    held_out = {
        frozenset(words_of(p)) for seed in range(3) for p in preference_set("held_out", 600, seed=seed)["prompt"]
    }
    assert len(train) > 3000
    assert len(held_out) > 1500
    assert not train & held_out


def test_split_goes_by_the_set_of_words_and_holds_out_a_tenth():
    sets = list(itertools.combinations(WORDS, 3))
    share = sum(map(is_held_out, sets)) / len(sets)
    assert 0.09 < share < 0.12
    assert all(is_held_out(words) == is_held_out(words[::-1]) for words in sets[:500])


def test_same_seed_same_rows_other_seed_other_rows():
    rows, again, other = (preference_set("train", 60, seed=seed).to_list() for seed in (5, 5, 6))
    assert rows == again
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


def test_rows_do_not_depend_on_the_machine():
    """Worked once, committed: `random.Random(str)` and SHA-256 give the same everywhere."""
    assert preference_set("held_out", 2)["prompt"] == PROMPTS


def test_gold_rows_order_right_nearly_wrong():
    rows = preference_set("train", 60, seed=1, gold=True)
    plain = preference_set("train", 60, seed=1)
    assert rows["prompt"] == plain["prompt"]
    assert rows["reference"] == plain["chosen"]
    assert rows["rejected"] == plain["rejected"]
    for row in rows:
        assert check(row["prompt"], row["reference"])
        assert not check(row["prompt"], row["chosen"])
        assert sorted(row["chosen"].split()) == sorted(row["reference"].split())
        assert row["chosen"] != row["rejected"]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='test': choose 'train' or 'held_out'"):
        preference_set("test", 6)  # type: ignore[arg-type]


PROMPTS = [
    "Sort ascending: moth goat ant\nAnswer:",
    "Sort descending: fox mouse deer zebra cow\nAnswer:",
]
