"""The same ids as TRL 1.16's own preparation, where that is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
from data_helpers import assistant, prepared, user
from datasets import Dataset

from prefopt.data import PrepareOptions, prepare_report
from prefopt.types import PAIR, TRIPLE

pytestmark = pytest.mark.trl

NUM_ROWS = 160
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def trl_rows(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None, mode: str = "keep_start"
) -> list[dict[str, Any]]:
    """What TRL's DPO trainer makes of the rows, each with its number."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    numbered = Dataset.from_list([{**row, "number": number} for number, row in enumerate(rows)])
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    own = SimpleNamespace(_tokenizer=tokenizer)
    return list(trainer._prepare_dataset(own, numbered, tokenizer, args, "train"))


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The row as messages."""
    completions = {side: [assistant(row[side])] for side in PAIR}
    return {"prompt": [user(row["prompt"])], **completions}


def implicit(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt inside the completions."""
    return {side: row["prompt"] + row[side] for side in PAIR}


@pytest.mark.parametrize("name", ["qwen2", "stories"])
@pytest.mark.parametrize("max_length", [None, 256])
def test_text(
    name: str, max_length: int | None, ultrafeedback: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    rows = ultrafeedback[:NUM_ROWS]
    ours = prepared(rows, tokenizer, PrepareOptions(PAIR, max_length, "keep_start"))
    theirs = {row["number"]: row for row in trl_rows(rows, tokenizer, max_length)}
    skipped = {row for rows in prepare_report(ours).skipped.values() for row in rows}
    assert len(ours) > NUM_ROWS / 3
    assert set(theirs) - set(ours["row"]) <= skipped
    assert set(ours["row"]) <= set(theirs)
    for row in ours:
        peer = theirs[row["row"]]
        assert row["prompt_ids"] == peer["prompt_ids"]
        for side in PAIR:
            room = None if max_length is None else max_length - len(peer["prompt_ids"])
            assert row[f"{side}_ids"] == peer[f"{side}_ids"][:room]
            assert all(row[f"{side}_mask"])


@pytest.mark.parametrize("make", [conversation, lambda row: implicit(conversation(row))], ids=["prompt", "implicit"])
def test_conversations(make: Any, ultrafeedback: list[dict[str, Any]], qwen2: Any) -> None:
    rows = [make(row) for row in ultrafeedback[:NUM_ROWS]]
    ours = prepared(rows, qwen2)
    theirs = trl_rows(rows, qwen2, None)
    assert len(ours) == NUM_ROWS
    for row, peer in zip(ours, theirs, strict=True):
        assert {column: row[column] for column in COLUMNS} == {column: peer[column] for column in COLUMNS}


@pytest.mark.parametrize("name", ["qwen2", "stories"])
def test_text_with_the_prompt_inside(
    name: str, ultrafeedback: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """The same sequences; the prompt is TRL's, or ends earlier where TRL's ends within a word of several tokens."""
    tokenizer = request.getfixturevalue(name)
    rows = [implicit(row) for row in ultrafeedback[:NUM_ROWS]]
    num_equal = 0
    for row, peer in zip(prepared(rows, tokenizer), trl_rows(rows, tokenizer, None), strict=True):
        for side in PAIR:
            assert [*row["prompt_ids"], *row[f"{side}_ids"]] == [*peer["prompt_ids"], *peer[f"{side}_ids"]]
        assert peer["prompt_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        num_equal += peer["prompt_ids"] == row["prompt_ids"]
    assert num_equal > NUM_ROWS * (0.6 if name == "qwen2" else 0.2), "most words are one token, in a large vocabulary"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_sequences(
    mode: Literal["keep_start", "keep_end"], ultrafeedback: list[dict[str, Any]], qwen2: Any
) -> None:
    """TRL cuts in its collator: the tokens it gives the model, and those it scores, are ours."""
    collator = pytest.importorskip("trl.trainer.dpo_trainer").DataCollatorForPreference(
        pad_token_id=0, max_length=200, truncation_mode=mode
    )
    rows = ultrafeedback[:NUM_ROWS]
    theirs = {row["number"]: row for row in trl_rows(rows, qwen2, 200, mode)}
    ours = prepared(rows, qwen2, PrepareOptions(PAIR, 200, mode))
    assert prepare_report(ours).num_truncated > NUM_ROWS / 4
    for row in ours:
        batch = collator([theirs[row["row"]]])
        for index, side in enumerate(PAIR):
            length = int(batch["attention_mask"][index].sum())
            prompt_ids = row["prompt_ids"][row.get(f"{side}_prompt_start", 0) :]
            assert [*prompt_ids, *row[f"{side}_ids"]] == batch["input_ids"][index, :length].tolist()
            scored = [False] * len(prompt_ids) + row[f"{side}_mask"]
            # The first token of a sequence is in TRL's mask too, but nothing predicts it.
            assert scored[1:] == batch["completion_mask"][index, 1:length].bool().tolist()
            assert not scored[0]


def test_triples(shared: Any, stories: Any) -> None:
    module = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    rows = Dataset.from_json(str(shared / "data" / "gsm8k" / "triples.jsonl")).select(range(60))  # type: ignore[union-attr]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    own = SimpleNamespace(_tokenize=module.TPOTrainer._tokenize)
    theirs = module.TPOTrainer._prepare_dataset(own, rows, stories, args, "train")
    ours = prepared(rows.to_list(), stories, PrepareOptions(TRIPLE, None, "keep_start"))
    columns = (*COLUMNS, "reference_ids")
    for row, peer in zip(ours, theirs, strict=True):
        assert {column: row[column] for column in columns} == {column: peer[column] for column in columns}
