"""Rows that TRL 1.16 renders, cuts or accepts wrongly, and what prefopt makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from datasets import Dataset
from independent import score, score_rows, sums
from parity_harness import POLICY, REFERENCE, RELATIVE, build, padding_tokenizer, run
from tiny_models import CHAT_TEMPLATE, conversational_rows, standard_rows, tiny_model, word_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.trl

ONE_STEP = {"max_steps": 1}
START, END = "<|im_start|>", "<|im_end|>"
NEWLINE = "tata"
"""Stands for the newline that real templates write after a turn; the tokenizer of these tests drops white space."""


def dataset(rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_dict(rows)}


def test_chat_data_of_cpo_ends_once() -> None:
    """A template that ends turns with the EOS token and a newline: TRL's CPO appends another EOS, and trains on it."""
    tokenizer = word_tokenizer(eos_token=END)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE.replace(END, f"{END} {NEWLINE}")
    eos, newline = tokenizer.convert_tokens_to_ids([END, NEWLINE])
    arguments = dataset(conversational_rows(4)) | {"processing_class": tokenizer}
    theirs = build("trl", "cpo", ONE_STEP, **arguments).train_dataset[0]["chosen_labels"]
    ours = build("prefopt", "cpo", ONE_STEP, **arguments).train_dataset[0]["chosen_ids"]
    message = conversational_rows(4)["chosen"][0][0]["content"]
    words = tokenizer(message, add_special_tokens=False)["input_ids"]
    assert theirs[-len(words) - 3 :] == [*words, eos, newline, eos]
    assert ours == [*words, eos, newline]


def test_a_completion_starts_where_the_tokens_of_the_prompt_end() -> None:
    """Of "xab" and "c" the tokens are x, a, b alone and x, abc together: TRL's CPO takes one token back, whatever
    merged, and hides all of "abc" from the loss."""
    merges = [("b", "c"), ("a", "bc")]
    vocabulary = {token: index for index, token in enumerate(["</s>", *"abcdx", "bc", "abc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    rows = dataset({"prompt": ["xab"] * 4, "chosen": ["cc"] * 4, "rejected": ["cd"] * 4})
    arguments = rows | {"processing_class": tokenizer}
    theirs = build("trl", "cpo", ONE_STEP, **arguments).train_dataset[0]
    ours = build("prefopt", "cpo", ONE_STEP, **arguments).train_dataset[0]
    x, c, abc, eos = tokenizer.convert_tokens_to_ids(["x", "c", "abc", "</s>"])
    assert theirs["chosen_input_ids"][-4:] == [x, abc, c, eos]
    assert theirs["chosen_labels"][-4:] == [-100, -100, c, eos]
    assert (ours["prompt_ids"], ours["chosen_ids"]) == ([x], [abc, c, eos])


def long_prompt() -> dict[str, list[str]]:
    """Four rows; the prompt of the second fills a budget of 14 tokens on its own."""
    rows = standard_rows(4)
    return rows | {"prompt": [rows["prompt"][0], " ".join(["gaga"] * 20), *rows["prompt"][2:]]}


def without_row(rows: dict[str, list[Any]], row: int) -> dict[str, list[Any]]:
    return {column: values[:row] + values[row + 1 :] for column, values in rows.items()}


@pytest.mark.parametrize(("method", "loss_type"), [("cpo", "simpo"), ("tpo", "sigmoid")])
def test_a_row_without_completion_tokens_is_skipped(method: str, loss_type: str) -> None:
    """TRL keeps it: CPO's SimPO divides by a length of 0, TPO scores an empty completion as certain."""
    rows = long_prompt()
    if method == "tpo":
        rows["reference"] = rows["chosen"]
    config = {"loss_type": loss_type, "max_length": 14, **ONE_STEP}
    ours = run("prefopt", method, config, **dataset(rows))[0]
    theirs = run("trl", method, config, **dataset(rows))[0]
    right = run("trl", method, config, **dataset(without_row(rows, 1)))[0]
    assert ours["loss"] == pytest.approx(right["loss"], rel=RELATIVE)
    assert ours["logps/chosen"] == pytest.approx(right["logps/chosen"], rel=RELATIVE)
    assert theirs["logps/chosen"] != pytest.approx(right["logps/chosen"], rel=10 * RELATIVE)


def test_no_sequence_of_cpo_is_longer_than_max_length() -> None:
    """TRL's CPO never cuts a prompt: a sequence may exceed the limit and the model's context."""
    config = {"max_length": 14, "loss_type": "sigmoid", **ONE_STEP}
    theirs = build("trl", "cpo", config, **dataset(long_prompt())).train_dataset
    ours = build("prefopt", "cpo", config, **dataset(long_prompt())).train_dataset
    assert max(map(len, theirs["chosen_input_ids"])) > 14
    assert len(ours) == 3
    assert all(len(row["prompt_ids"]) + len(row["chosen_ids"]) <= 14 for row in ours)


def test_no_training_on_the_users_turns() -> None:
    """Completions of several turns: TRL scores the user's words as if the model had said them."""

    def turns(first: str, second: str) -> list[dict[str, str]]:
        question = {"role": "user", "content": "mama mama mama"}
        return [{"role": "assistant", "content": first}, question, {"role": "assistant", "content": second}]

    rows = conversational_rows(4)
    rows["chosen"] = [turns("baba bebe", "bibi")] * 4
    rows["rejected"] = [turns("dada", "dede didi")] * 4
    tokenizer = padding_tokenizer()
    model = tiny_model(**POLICY)
    expected = []
    for prompt in rows["prompt"]:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"]
        words = (
            "baba bebe <|im_end|> <|im_start|> user mama mama mama <|im_end|> <|im_start|> assistant bibi <|im_end|>"
        )
        logps = score(model, ids, tokenizer(words, add_special_tokens=False)["input_ids"]).logps
        expected.append(float(logps[:3].sum() + logps[-2:].sum()))
    right = sum(expected) / len(expected)
    ours, theirs = (
        run(library, "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(rows))[0]["logps/chosen"]
        for library in ("prefopt", "trl")
    )
    assert ours == pytest.approx(right, rel=RELATIVE)
    assert theirs < 1.5 * right, "TRL counts the log-probs of eight more tokens"


def test_pairs_that_teach_nothing_are_skipped() -> None:
    """Chosen equal to rejected: TRL trains on ln 2, which moves nothing but counts in every mean."""
    rows = standard_rows(5)
    rows["rejected"][2] = rows["chosen"][2]
    ours = build("prefopt", "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(rows))
    theirs = build("trl", "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(rows))
    assert [row["row"] for row in ours.train_dataset] == [0, 1, 3, 4]
    assert len(theirs.train_dataset) == 5


def test_reference_log_probs_that_come_with_the_data_are_used() -> None:
    """TRL has the columns in its signature but computes the reference all the same."""
    given = {"ref_chosen_logps": [-30.0] * 4, "ref_rejected_logps": [-40.0] * 4}
    rows: dict[str, list[Any]] = {**standard_rows(4), **given}
    chosen = score_rows(tiny_model(**POLICY), word_tokenizer(), {k: rows[k] for k in ("prompt", "chosen")})["chosen"]
    expected = 0.1 * float((sums(chosen) + 30.0).mean())
    ours, theirs = (
        run(library, "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(rows))[0]["rewards/chosen"]
        for library in ("prefopt", "trl")
    )
    assert ours == pytest.approx(expected, rel=RELATIVE)
    assert theirs != pytest.approx(expected, rel=10 * RELATIVE)


def test_columns_of_weights_and_margins_act() -> None:
    """TRL trains as if they were not there: at the first step, where policy and reference agree, it gives ln 2."""
    numbers = {"weight": [2.0, 1.0, 0.0, 1.0], "margin": [1.0, 0.0, 3.0, -1.0]}
    rows: dict[str, list[Any]] = {**standard_rows(4), **numbers}
    losses = [math.log(1 + math.exp(margin)) for margin in numbers["margin"]]
    expected = sum(weight * loss for weight, loss in zip(numbers["weight"], losses, strict=True)) / 4
    ours, theirs = (
        run(library, "dpo", ONE_STEP, ref_model=tiny_model(**POLICY), **dataset(rows))[0]["loss"]
        for library in ("prefopt", "trl")
    )
    assert ours == pytest.approx(expected, rel=RELATIVE)
    assert theirs == pytest.approx(math.log(2), rel=RELATIVE)


def test_tokenised_rows_are_taken() -> None:
    """Rows of ids train as the texts they came from; TRL asks for text columns."""
    rows = standard_rows(4)
    tokenizer = word_tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
    ids: dict[str, list[Any]] = {"prompt_ids": prompts}
    for side in ("chosen", "rejected"):
        whole = [tokenizer(p + c + "</s>")["input_ids"] for p, c in zip(rows["prompt"], rows[side], strict=True)]
        ids[f"{side}_ids"] = [full[len(prompt) :] for full, prompt in zip(whole, prompts, strict=True)]
    from_ids, from_text = (
        run("prefopt", "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(data))[0] for data in (ids, rows)
    )
    assert from_ids["loss"] == pytest.approx(from_text["loss"], rel=1e-6)
    with pytest.raises(KeyError):
        build("trl", "dpo", ONE_STEP, ref_model=tiny_model(**REFERENCE), **dataset(ids))


def test_tpo_without_nll_needs_no_gold_column() -> None:
    config = {"tpo_alpha": 0.0, "beta": 0.1, **ONE_STEP}
    ours = run("prefopt", "tpo", config, **dataset(standard_rows(4)))[0]
    theirs = run("trl", "tpo", config, **dataset(standard_rows(4, gold=True)))[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
    with pytest.raises(ValueError, match="reference"):
        build("trl", "tpo", config, **dataset(standard_rows(4)))
