"""The whole stage: what is skipped and said, broken sets, caching, streams, processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import datasets
import pytest
from data_helpers import PAIR_OPTIONS, assistant, byte_tokenizer, prepared, user
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from prefopt.data import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.data.encode import RowEncoder
from prefopt.types import PAIR, TRIPLE

ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c"},
    {"prompt": "a ", "chosen": "b", "rejected": ""},
    {"prompt": "a ", "chosen": "same", "rejected": "same"},
    {"prompt": "a ", "chosen": "b", "rejected": "</s>"},
    {"prompt": "a ", "chosen": "bcd", "rejected": "e"},
    {"prompt": "a long prompt", "chosen": "b", "rejected": "c"},
    {"prompt": "a ", "chosen": "long and one", "rejected": "long and two"},
]


def options(
    max_length: int | None = None,
    mode: Literal["keep_start", "keep_end"] = "keep_start",
    on_bad_row: Literal["skip", "error"] = "skip",
    num_proc: int | None = None,
) -> PrepareOptions:
    return PrepareOptions(PAIR, max_length, mode, num_proc=num_proc, on_bad_row=on_bad_row)


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


def test_rows_with_nothing_to_learn_are_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    kept = prepared(ROWS, byte_tokenizer(), options(7))
    assert kept["row"] == [0, 4]
    report = prepare_report(kept)
    assert report.skipped == {
        "empty completion": [1, 3],
        "chosen equal to rejected": [2],
        "no completion token left within max_length": [5],
        "chosen equal to rejected within max_length": [6],
    }
    assert (report.num_rows, report.num_kept, report.num_truncated) == (7, 2, 0)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 4
    assert "train data: skipped 2 of 7 rows: empty completion (rows 1, 3)." in messages


def test_many_rows_are_counted_and_the_first_are_named(caplog: pytest.LogCaptureFixture) -> None:
    prepared([ROWS[0], *[ROWS[2]] * 8], byte_tokenizer())
    assert "skipped 8 of 9 rows: chosen equal to rejected (rows 1, 2, 3, 4, 5, ..)." in caplog.text


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_the_first_row_with_nothing_to_learn_stops_the_run_if_asked(make: Any) -> None:
    with pytest.raises(ValueError, match=r"train data, row 1: empty completion.*on_bad_row='skip'"):
        list(prepare_dataset(make(ROWS), byte_tokenizer(), options(on_bad_row="error"), name="train"))


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_no_row_left_says_why(make: Any) -> None:
    with pytest.raises(ValueError, match=r"none of the 7 rows.*4 x no completion token.*2 x empty.*Raise max_length"):
        list(prepare_dataset(make(ROWS), byte_tokenizer(), options(1), name="train"))


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))])
def test_an_empty_set_is_an_error(make: Any) -> None:
    with pytest.raises(ValueError, match="train data: the data set is empty"):
        list(prepare_dataset(make([]), byte_tokenizer(), PAIR_OPTIONS, name="train"))


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_a_broken_row_is_an_error_in_any_case(num_proc: int | None, on_bad_row: Any) -> None:
    rows = [*ROWS[:1], {"prompt": "a", "chosen": None, "rejected": "b"}]
    with pytest.raises(ValueError, match="eval data, row 1, column 'chosen': the value is None"):
        prepare_dataset(
            Dataset.from_list(rows), byte_tokenizer(), options(on_bad_row=on_bad_row, num_proc=num_proc), name="eval"
        )


def test_wrong_columns_and_wrong_kinds_of_sets() -> None:
    rows = Dataset.from_list([{"prompt": "a", "good": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="train data: no column 'chosen'"):
        prepare_dataset(rows, byte_tokenizer(), PAIR_OPTIONS, name="train")
    for wrong in (DatasetDict({"train": rows}), [{"prompt": "a"}], None):
        with pytest.raises(TypeError, match="train data: expected a Dataset"):
            prepare_dataset(wrong, byte_tokenizer(), PAIR_OPTIONS, name="train")  # type: ignore[arg-type]


def test_numbers_instead_of_text() -> None:
    with pytest.raises(ValueError, match=r"row 0, column 'rejected': expected text.*int 3"):
        prepared([{"prompt": "a", "chosen": "b", "rejected": 3}], byte_tokenizer())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="truncation_mode is 'middle'; set it to 'keep_start' or 'keep_end'"):
        options(mode="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_bad_row is 'stop'"):
        options(on_bad_row="stop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length is 0"):
        options(0)


def test_columns_and_the_example_they_make() -> None:
    rows = [{"prompt": "abcd", "chosen": "x", "rejected": "yzu", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]
    tokenizer = byte_tokenizer()
    [row] = prepared(rows, tokenizer, options(5, "keep_end"))
    assert set(row) == {"row", "prompt_ids", "ref_chosen_logps", "ref_rejected_logps"} | {
        f"{side}_{part}" for side in PAIR for part in ("ids", "mask", "prompt_start")
    }
    example = tokenized_example(row, PAIR)
    assert tokenizer.decode(example.prompt_ids) == "bcd"
    assert example.prompt_starts == {"chosen": 0, "rejected": 2}
    assert example.ref_sum_logps == {"chosen": -1.0, "rejected": -2.0}
    [row] = prepared(rows, tokenizer, options(7))
    assert "chosen_prompt_start" not in row
    example = tokenized_example(row, PAIR)
    assert example.prompt_starts == {"chosen": 0, "rejected": 0}
    assert tokenizer.decode(example.completion_ids["rejected"]) == "yzu"


def test_gold_completions() -> None:
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c", "reference": text} for text in ("d", "")]
    tokenizer = byte_tokenizer()
    kept = prepared(rows, tokenizer, PrepareOptions(TRIPLE, None, "keep_start"))
    assert kept["row"] == [0]
    assert tokenizer.decode(tokenized_example(kept[0], TRIPLE).completion_ids["gold"]) == "d</s>"


def test_rows_of_token_ids_are_checked_too() -> None:
    rows = [
        {"prompt_ids": [4, 5], "chosen_ids": [6, 7], "rejected_ids": [8]},
        {"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [6]},
        {"prompt_ids": [4, 5], "chosen_ids": [], "rejected_ids": [6]},
        {"prompt_ids": [], "chosen_ids": [6], "rejected_ids": [6, 7]},
    ]
    kept = prepared(rows, byte_tokenizer())
    assert kept["row"] == [0]
    assert kept[0]["chosen_ids"] == [6, 7]
    assert kept[0]["chosen_mask"] == [True, True]
    assert list(map(len, prepare_report(kept).skipped.values())) == [1, 1, 1]


def test_one_set_may_mix_formats() -> None:
    """Text and token ids side by side; each row is read as what it is."""
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "prompt_ids": None, "chosen_ids": None, "rejected_ids": None},
        {"prompt": None, "chosen": None, "rejected": None, "prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6]},
    ]
    kept = prepared(rows, byte_tokenizer())
    assert kept[1]["chosen_ids"] == [5]
    assert kept[0]["chosen_ids"][-1] == byte_tokenizer().eos_token_id


@pytest.mark.parametrize("make", [Dataset.from_list, stream])
def test_a_prepared_set_is_returned_as_it_is(make: Any) -> None:
    once = prepare_dataset(make(ROWS), byte_tokenizer(), options(7), name="train")
    assert prepare_dataset(once, byte_tokenizer(), options(3), name="train") is once


def test_only_the_prepared_set_itself_has_a_report() -> None:
    with pytest.raises(ValueError, match="has no report"):
        prepare_report(prepared(ROWS, byte_tokenizer()).select([0]))


def test_formatted_sets_are_read_as_they_are_stored() -> None:
    rows = Dataset.from_list([{"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6]}]).with_format("numpy")
    assert prepare_dataset(rows, byte_tokenizer(), PAIR_OPTIONS, name="train")[0]["chosen_ids"] == [5]


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """A set in a file, so that what is made of it is cached."""
    path = tmp_path / "rows.jsonl"
    Dataset.from_list(ROWS).to_json(path)

    def load(streaming: bool = False) -> Any:
        arguments: Any = {"streaming": streaming}
        return load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"), **arguments)

    return load


class Counter:
    """Counts calls of the function that tokenises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls = 0
        encode = RowEncoder.__call__

        def counted(*arguments: Any) -> Any:
            self.num_calls += 1
            return encode(*arguments)

        monkeypatch.setattr(RowEncoder, "__call__", counted)


def test_a_second_run_finds_the_cache(on_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_dataset(on_disk(), byte_tokenizer(), options(7), name="train")
    counter = Counter(monkeypatch)
    tokenizer = byte_tokenizer()
    tokenizer(["a", "abc"], padding=False, truncation=True, max_length=2)  # leaves its mark in the tokenizer
    second = prepare_dataset(on_disk(), tokenizer, options(7), name="train")
    assert counter.num_calls == 0
    assert list(first) == list(second)
    assert prepare_report(first) == prepare_report(second)


@pytest.mark.parametrize("change", ["tokenizer", "template", "max_length", "mode", "branches", "rows"])
def test_the_cache_is_keyed_by_all_that_matters(on_disk: Any, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_dataset(on_disk(), byte_tokenizer(), options(7), name="train")
    counter = Counter(monkeypatch)
    tokenizer = byte_tokenizer(bos=change == "tokenizer", template="x" if change == "template" else None)
    if change != "template":
        tokenizer.chat_template = byte_tokenizer().chat_template
    changed = {"max_length": options(8), "mode": options(7, "keep_end")}.get(change, options(7))
    rows = on_disk()
    if change == "branches":
        changed = PrepareOptions(TRIPLE, 7, "keep_start")
        rows = rows.map(lambda row: {"reference": "gold"})
    prepare_dataset(rows.select(range(5)) if change == "rows" else rows, tokenizer, changed, name="train")
    assert counter.num_calls == 1


def test_processes_change_nothing(on_disk: Any) -> None:
    alone = prepare_dataset(on_disk(), byte_tokenizer(), options(), name="train")
    both = prepare_dataset(on_disk(), byte_tokenizer(), options(num_proc=2), name="train")
    assert list(alone) == list(both)
    assert prepare_report(alone) == prepare_report(both)


def test_a_stream_gives_the_rows_of_the_set(on_disk: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    expected = list(prepare_dataset(on_disk(), tokenizer, options(7), name="train"))
    caplog.clear()
    streamed = prepare_dataset(on_disk(streaming=True), tokenizer, options(7), name="train")
    assert isinstance(streamed, IterableDataset)
    assert next(iter(streamed)) == expected[0]
    assert not caplog.records, "nothing is known of the rest yet"
    assert list(streamed) == expected
    assert list(streamed) == expected
    report = prepare_report(streamed)
    assert (report.num_rows, report.num_kept) == (7, 2), "a second reading counts nothing twice"
    assert len([record for record in caplog.records if "skipped" in record.message]) == 4


def test_a_stream_is_read_lazily() -> None:
    def rows() -> Any:
        yield from ROWS[:1] * 40
        raise AssertionError("read too far")

    streamed = prepare_dataset(IterableDataset.from_generator(rows), byte_tokenizer(), options(), name="train")
    assert next(iter(streamed))["row"] == 0


def test_a_stream_of_conversations_in_a_data_loader() -> None:
    from torch.utils.data import DataLoader

    rows = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant(str(i))]} for i in range(5)]
    streamed = prepare_dataset(stream(rows), byte_tokenizer(), options(), name="train")
    loaded: Any = DataLoader(streamed, batch_size=None)  # type: ignore[arg-type]
    assert [row["row"] for row in loaded] == list(range(5))


def test_the_dirt_in_real_data_is_found(ultrafeedback: list[dict[str, Any]], qwen2: Any, stories: Any) -> None:
    for tokenizer in (qwen2, stories):
        report = prepare_report(prepared(ultrafeedback, tokenizer))
        assert report.skipped == {"chosen equal to rejected": [306, 655, 910, 997], "empty completion": [478, 833]}
        assert report.num_kept == 994


def test_caching_survives_being_switched_off(on_disk: Any) -> None:
    datasets.disable_caching()
    try:
        assert len(prepare_dataset(on_disk(), byte_tokenizer(), options(7), name="train")) == 2
    finally:
        datasets.enable_caching()
