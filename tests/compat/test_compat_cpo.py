"""What users of TRL's CPO tests touch: losses at a wild learning rate, adapters, metrics, the config's names."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from parameters import CONTAINERS, ROWS, check_losses, check_prepared, pairs, snapshot, train_and_compare
from tiny_models import conversational_rows, implicit, standard_rows, tiny_model, word_tokenizer
from transformers import PreTrainedTokenizerFast

from prefopt import CPOConfig, CPOTrainer

WILD = 0.9
"""The learning rate of such tests: the weights fly off, and the run must still end."""


def config(out: str, **options: Any) -> CPOConfig:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "remove_unused_columns": False,
        "learning_rate": WILD,
        "eval_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return CPOConfig(out, **{**usual, **options})


def tokenizer() -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.pad_token = made.eos_token
    return made


def trainer_of(args: CPOConfig, rows: dict[str, list[Any]] | None = None, **options: Any) -> CPOTrainer:
    """Training and evaluation set, a loaded model and a tokenizer with a pad token."""
    rows = rows or standard_rows(ROWS)
    given: dict[str, Any] = {
        "model": tiny_model(),
        "processing_class": tokenizer(),
        "train_dataset": Dataset.from_dict(rows),
        "eval_dataset": Dataset.from_dict({column: values[:3] for column, values in rows.items()}),
    }
    return CPOTrainer(args=args, **{**given, **options})


@pytest.mark.parametrize(
    ("options", "conversational"),
    [
        ({"loss_type": "sigmoid"}, False),
        ({"loss_type": "hinge"}, True),
        ({"loss_type": "ipo"}, True),
        ({"loss_type": "simpo"}, False),
        ({"loss_type": "alphapo", "alpha": 0.5, "simpo_gamma": 0.5}, False),
    ],
    ids=["sigmoid", "hinge", "ipo", "simpo", "alphapo"],
)
def test_every_loss_moves_every_parameter(options: dict[str, Any], conversational: bool, out: str) -> None:
    rows = conversational_rows(ROWS) if conversational else standard_rows(ROWS)
    assert not train_and_compare(trainer_of(config(out, beta=0.1, **options), rows))


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_an_adapter(conversational: bool, explicit: bool, out: str) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    rows = conversational_rows(ROWS) if conversational else standard_rows(ROWS)
    args = config(out, gradient_accumulation_steps=4)
    trainer = trainer_of(args, rows if explicit else implicit(rows), peft_config=adapter)
    still = train_and_compare(trainer)
    assert still == {name for name in snapshot(trainer.model) if "lora" not in name}


def test_metrics_of_the_user(out: str) -> None:
    args = config(out, max_steps=4, eval_steps=1, per_device_eval_batch_size=2, learning_rate=1e-3)
    trainer = trainer_of(args, compute_metrics=lambda *args, **kwargs: {"mine": 0.25})
    trainer.train()
    assert trainer.state.log_history[-2]["eval_mine"] == 0.25


def test_a_last_batch_of_one_pair(out: str) -> None:
    """Seventeen rows by two, with means per token and over tokens."""
    args = config(out, max_steps=-1, num_train_epochs=1, loss_type="simpo", learning_rate=1e-3, logging_steps=1)
    trainer = trainer_of(args)
    trainer.train()
    assert [row["loss"] > 0 for row in trainer.state.log_history if "loss" in row] == [True] * 9


def test_keys_of_a_training_row(out: str) -> None:
    trainer = trainer_of(config(out, logging_steps=1, max_steps=1))
    trainer.train()
    row = trainer.state.log_history[0]
    sides = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert sides | {"loss", "nll_loss", "rewards/accuracies", "rewards/margins", "grad_norm"} <= set(row)


def test_a_training_set_is_required(out: str) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        CPOTrainer(tiny_model(), config(out), processing_class=tokenizer())


def test_a_model_or_a_way_to_make_one_is_required(out: str) -> None:
    with pytest.raises(ValueError, match="model"):
        trainer_of(config(out), model=None)


@pytest.mark.parametrize("options", [{"loss_type": "hinge"}, {"loss_type": "ipo"}])
def test_smoothing_that_a_loss_ignores_is_said(options: dict[str, Any], out: str) -> None:
    with pytest.warns(UserWarning, match="label_smoothing"):
        config(out, label_smoothing=0.1, **options)


def test_alphapo_stays_as_it_was_given(out: str) -> None:
    args = config(out, loss_type="alphapo", alpha=0.25)
    assert args.loss_type == "alphapo"
    assert args.objective().logs_nll
    assert not any(term.startswith("nll") for term in args.objective().names)


def test_the_kind_of_model_may_be_set_later(out: str) -> None:
    args = config(out)
    args.is_encoder_decoder = False
    assert trainer_of(args).args.is_encoder_decoder is False


@pytest.mark.parametrize("container", CONTAINERS)
def test_evaluation_sets(container: str, out: str) -> None:
    trainer = trainer_of(config(out), eval_dataset=CONTAINERS[container](pairs(4)))
    check_prepared(trainer.eval_dataset)
    check_losses(trainer.evaluate(), container)


def test_one_model_for_several_trainers(out: str) -> None:
    """Built one after the other on the same instance, as a notebook does."""
    model = tiny_model()
    first = trainer_of(config(out, learning_rate=1e-3), model=model)
    first.train()
    second = trainer_of(config(out, learning_rate=1e-3, loss_type="simpo"), model=model)
    assert not train_and_compare(second)
    assert second.model is model


def test_tags(out: str) -> None:
    assert {"prefopt", "cpo"} <= set(trainer_of(config(out)).model.model_tags)
