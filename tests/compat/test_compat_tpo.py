"""What users of TRL's TPO tests touch: three completions, the collator with and without gold, containers, errors."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from parameters import CONTAINERS, ROWS, check_losses, check_prepared, pairs, snapshot, train_and_compare
from tiny_models import conversational_rows, implicit, standard_rows

from prefopt import DataCollatorForTriplePreference, TPOConfig, TPOTrainer


def config(out: str, **options: Any) -> TPOConfig:
    return TPOConfig(out, **{"learning_rate": 0.1, "report_to": "none", "disable_tqdm": True, **options})


def triples(count: int = ROWS) -> Dataset:
    return pairs(count, gold=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_every_loss_moves_every_parameter(loss_type: str, model: str, out: str) -> None:
    args = config(out, loss_type=loss_type, eval_strategy="steps", eval_steps=3)
    trainer = TPOTrainer(model, args=args, train_dataset=triples(), eval_dataset=triples(3))
    assert not train_and_compare(trainer)
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [3, 6, 9]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_formats_train(conversational: bool, explicit: bool, model: str, out: str) -> None:
    rows = conversational_rows(ROWS, gold=True) if conversational else standard_rows(ROWS, gold=True)
    data = Dataset.from_dict(rows if explicit else implicit(rows))
    assert not train_and_compare(TPOTrainer(model, args=config(out), train_dataset=data))


def test_gold_may_be_the_chosen_completion(model: str, out: str) -> None:
    rows = standard_rows(ROWS)
    data = Dataset.from_dict(rows | {"reference": rows["chosen"]})
    assert not train_and_compare(TPOTrainer(model, args=config(out), train_dataset=data))


def test_without_nll_the_collator_leaves_gold_out(model: str, out: str) -> None:
    trainer = TPOTrainer(model, args=config(out, tpo_alpha=0.0), train_dataset=triples())
    assert isinstance(trainer.data_collator, DataCollatorForTriplePreference)
    assert trainer.data_collator.include_reference is False
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(3))))
    assert batch["input_ids"].shape[0] == 6
    assert not train_and_compare(trainer)


def test_with_nll_the_collator_takes_gold(model: str, out: str) -> None:
    trainer = TPOTrainer(model, args=config(out), train_dataset=triples())
    assert trainer.data_collator.include_reference is True
    assert trainer.data_collator(list(trainer.train_dataset.select(range(3))))["input_ids"].shape[0] == 9


def test_a_gold_completion_of_another_prompt(model: str, out: str) -> None:
    rows = implicit(standard_rows(4, gold=True))
    rows["reference"] = ["fafa fefe"] * 4
    with pytest.raises(ValueError, match="implicit prompt"):
        TPOTrainer(model, args=config(out), train_dataset=Dataset.from_dict(rows))


def test_no_gold_column(model: str, out: str) -> None:
    with pytest.raises(ValueError, match="reference"):
        TPOTrainer(model, args=config(out), train_dataset=pairs())


def test_a_training_set_is_required(model: str, out: str) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        TPOTrainer(model, args=config(out))


@pytest.mark.parametrize("container", [*CONTAINERS, None])
def test_evaluation_sets_at_construction(container: str | None, model: str, out: str) -> None:
    data = CONTAINERS[container](triples(4)) if container else None
    trainer = TPOTrainer(model, args=config(out), train_dataset=triples(), eval_dataset=data)
    if data is None:
        assert trainer.eval_dataset is None
    else:
        check_prepared(trainer.eval_dataset)


@pytest.mark.parametrize("container", CONTAINERS)
def test_evaluation_of_raw_sets(container: str, model: str, out: str) -> None:
    trainer = TPOTrainer(model, args=config(out), train_dataset=triples())
    check_losses(trainer.evaluate(eval_dataset=CONTAINERS[container](triples(5))), container)


def test_a_stream_trains(model: str, out: str) -> None:
    trainer = TPOTrainer(model, args=config(out, max_steps=3), train_dataset=triples().to_iterable_dataset())
    assert not train_and_compare(trainer)


def test_an_adapter(model: str, out: str) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM")
    trainer = TPOTrainer(model, args=config(out), train_dataset=triples(), peft_config=adapter)
    still = train_and_compare(trainer)
    assert still == {name for name in snapshot(trainer.model) if "lora" not in name}


def test_tags_and_the_output_folder(model: str, out: str) -> None:
    trainer = TPOTrainer(model, train_dataset=triples())
    assert {"prefopt", "tpo"} <= set(trainer.model.model_tags)
    assert trainer.args.output_dir.endswith("-TPO")
