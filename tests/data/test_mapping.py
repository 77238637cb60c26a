"""Data sets in other spellings, read by a mapping in YAML: the real files, through to token ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import PAIR_OPTIONS, TOOLS
from datasets import Dataset, IterableDataset

from prefopt.data import DatasetMixtureConfig, get_dataset, prepare_dataset, prepare_report
from prefopt.data.mapping import map_columns
from prefopt.data.messages import without_none

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
SHAREGPT = {"role_key": "from", "content_key": "value", "roles": {"human": "user", "gpt": "assistant"}}


def documented(path: str, place: Path, **options: Any) -> Any:
    """The set that the YAML example of docs/data.md about ``path`` describes, read from ``place``."""
    blocks = [block.split("```")[0] for block in DOCS.read_text().split("```yaml\n")[1:]]
    [block] = [block for block in blocks if path in block]
    return get_dataset(DatasetMixtureConfig(**yaml.safe_load(block.replace(path, str(place))), **options))["train"]


def test_the_sharegpt_file(shared: Path, qwen2: Any) -> None:
    path = shared / "data" / "sharegpt" / "dpo_en_demo.json"
    raw = json.loads(path.read_text())
    rows = documented("dpo_en_demo.json", path)
    assert len(rows) == len(raw) == 300
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for row, source in zip(without_none(rows.to_list()), raw, strict=True):
        prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in source["conversations"]]
        assert row["prompt"] == prompt
        assert row["chosen"] == [{"role": "assistant", "content": source["chosen"]["value"]}]
    kept = prepare_dataset(rows, qwen2, PAIR_OPTIONS, name="train")
    report = prepare_report(kept)
    assert (report.num_rows, report.skipped, report.num_rewritten) == (300, {}, 0)
    several = next(row for row in kept if len(raw[row["row"]]["conversations"]) == 7)
    turns = [turn["value"] for turn in raw[several["row"]]["conversations"]]
    prompt = qwen2.decode(several["prompt_ids"])
    assert all(turn in prompt for turn in turns)
    assert qwen2.decode(several["chosen_ids"]) == raw[several["row"]]["chosen"]["value"] + "<|im_end|>\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_tools_file(streaming: bool, shared: Path, qwen2: Any) -> None:
    """A preference for reasoning: the rejected side is the same conversation without it."""
    path = shared / "data" / "tools" / "reason_tool_use_demo_50.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    rows = documented("reason_tool_use_demo_50.jsonl", path, streaming=streaming)
    assert len(list(rows)) == len(raw) == 50
    for row, source in zip(rows, raw, strict=True):
        assert row["tools"] == source["tools"]
        expected = {"reasoning": "", "tool_call": "", "text": ""}
        for turn in source["messages"]:
            for part in turn["content"]:
                expected[part["type"]] += part["value"]
        assert "".join(turn["reasoning_content"] or "" for turn in row["chosen"]) == expected["reasoning"]
        assert not any(turn["reasoning_content"] for turn in row["rejected"])
        for side in ("chosen", "rejected"):
            assert "".join(turn["content"] for turn in row[side]) == expected["text"]
    with_tools = copy.deepcopy(qwen2)
    with_tools.chat_template = TOOLS
    kept = list(prepare_dataset(rows, with_tools, PAIR_OPTIONS, name="train"))
    assert [row["row"] for row in kept] == list(range(50))
    for row, source in zip(kept, raw, strict=True):
        said = [token for token, trained in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if trained]
        text = with_tools.decode(said)
        results = [part["value"] for turn in source["messages"] if turn["role"] == "tool" for part in turn["content"]]
        assert text.count("<think>") == sum(turn["role"] == "assistant" for turn in source["messages"])
        assert "<think>" not in with_tools.decode(row["rejected_ids"])
        assert not any(result in text for result in results if len(result) > 40)
        has_tools = with_tools.decode(row["prompt_ids"]).startswith("<|im_start|>system\nTools: ")
        assert has_tools == bool(json.loads(source["tools"] or "[]"))
    with pytest.raises(ValueError, match=r"none of the 50 rows.*50 x chosen equal to rejected"):
        # Qwen2's template knows no reasoning: it renders both sides alike.
        list(prepare_dataset(rows, qwen2, PAIR_OPTIONS, name="train"))


def test_reasoning_may_be_written_into_the_content(shared: Path, qwen2: Any) -> None:
    """For templates without a place for it; then Qwen2's own template renders two different sides."""
    rows = Dataset.from_json(str(shared / "data" / "tools" / "reason_tool_use_demo_50.jsonl"))
    columns = {
        "chosen": {"column": "messages", "keep": ["text", "reasoning", "tool_call"]},
        "rejected": {"column": "messages", "keep": ["text", "tool_call"]},
    }
    parts = {"text": "content", "reasoning": "<think>{}</think>\n", "tool_call": "tool_calls"}
    mapped = map_columns(rows, columns, {"parts": parts})  # type: ignore[arg-type]
    kept = prepare_dataset(mapped, qwen2, PAIR_OPTIONS, name="train")
    assert len(kept) == 50  # type: ignore[arg-type]
    assert qwen2.decode(kept[0]["chosen_ids"]).startswith("<think>Okay, the user is asking")  # type: ignore[index]


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))])
def test_columns_are_renamed_and_others_dropped(make: Any) -> None:
    mapped = map_columns(make([{"question": "a", "good": "b", "bad": "c", "x": 1}]), {"prompt": "question"}, None)
    assert list(mapped) == [{"prompt": "a"}]


def test_calls_that_are_objects_and_other_keys() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    parts = [{"kind": "call", "it": call}, {"kind": "say", "it": "a"}, {"kind": "say", "it": "b"}]
    entries = {
        "part_type_key": "kind",
        "part_value_key": "it",
        "parts": {"call": "tool_calls", "say": "content", "think": "thinking"},
    }
    rows = IterableDataset.from_generator(lambda: iter([{"m": {"role": "assistant", "content": parts}}]))
    [row] = list(map_columns(rows, {"chosen": "m"}, entries))
    text_call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert without_none(row["chosen"]) == [{"role": "assistant", "content": "ab", "tool_calls": [text_call]}]


def mapped_row(message: Any, entries: dict[str, Any], columns: Any = None) -> None:
    rows = IterableDataset.from_generator(lambda: iter([{"m": [message]}]))
    list(map_columns(rows, columns or {"chosen": "m"}, entries))


CALL = {"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]}


@pytest.mark.parametrize(
    ("message", "entries", "error"),
    [
        ({"from": "human", "value": "a"}, {}, "row 0, column 'm': the message has no 'role'"),
        ({"from": "humn", "value": "a"}, SHAREGPT, "unknown role 'humn'. Say under `messages: roles:`"),
        ({"role": "user", "content": [{"type": "odd", "value": "a"}]}, {}, "unknown type of part 'odd'"),
        (CALL, {}, "not a tool call: str '{'"),
        ({"role": "user", "content": "a"}, {"rolekey": "from"}, "messages: unknown entry 'rolekey'.*mean 'role_key'"),
    ],
)
def test_what_does_not_fit_is_named(message: Any, entries: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        mapped_row(message, entries)


@pytest.mark.parametrize(
    ("columns", "entries", "error"),
    [
        ({"chosen": "mm"}, {}, r"chosen is to come from 'mm', which .* \(columns: m\)"),
        ({"chosen": {"column": "m", "kep": []}}, {}, "columns: chosen: unknown entry 'kep'.*mean 'keep'"),
        ({"chosen": {"keep": ["text"]}}, {}, "columns: chosen: .*column"),
        ({"chosen": {"column": "m", "keep": ["text"]}}, None, "chosen keeps parts .* `messages:` must say"),
    ],
)
def test_entries_are_checked(columns: Any, entries: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        mapped_row({"role": "user", "content": "a"}, entries, columns)


def test_every_message_of_a_mapped_set_has_the_same_keys() -> None:
    """Otherwise the first rows would fix Arrow's types, and a later row with a call would not fit them."""
    plain = {"role": "assistant", "content": [{"type": "text", "value": "a"}]}
    calling = {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {}}'}]}
    mapped = map_columns(Dataset.from_list([{"m": [plain]}] * 1500 + [{"m": [calling]}]), {"chosen": "m"}, {})
    assert mapped[1500]["chosen"][0]["tool_calls"][0]["function"]["name"] == "f"  # type: ignore[index]
