"""Adapters by name: given, several of them, as the reference; and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import PLAIN_RUN
from peft_kinds import (
    KINDS,
    assert_trains_as_defined,
    log_probs,
    lora,
    run_of,
    several,
    shake,
    trained_names,
    tuner,
    with_adapter,
)
from short_runs import TRAINERS, dataset, trainer
from tiny_models import save_tiny, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM

from prefopt import DPOTrainer
from prefopt.reference.policy import AdapterOff, NamedAdapter, SeparateModel


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A base model with its tokenizer, and a trained adapter of it without one."""
    base = save_tiny(tmp_path / "base", seed=1)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), lora()())
    shake(adapted, "default")
    adapted.save_pretrained(tmp_path / "adapter")
    return base, str(tmp_path / "adapter")


@pytest.mark.parametrize("method", TRAINERS)
def test_the_name_of_an_adapter(method: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """Its base model is loaded, it is trained further, and the reference has it in force."""
    make, config = TRAINERS[method]
    options = {name: value for name, value in PLAIN_RUN.items() if name != "count"}
    args = config(str(tmp_path), **options, logging_steps=1, report_to="none", save_strategy="no")
    run = make(folders[1], args=args, train_dataset=dataset(4))
    assert isinstance(run.model, peft.PeftModel)
    assert all("lora" in name for name in trained_names(run.model))
    assert run.processing_class.eos_token == word_tokenizer().eos_token
    assert run.prepare_options.max_length == 256  # the context of the base model
    assert_trains_as_defined(run)


def test_an_adapter_on_the_name_of_an_adapter_and_one_as_reference(folders: tuple[str, str], tmp_path: Path) -> None:
    run = trainer(tmp_path, model=folders[1], peft_config=lora(target_modules=["v_proj"])(), **PLAIN_RUN)
    assert run.model.active_adapters == ["default", "preference"]
    assert_trains_as_defined(run)
    args = trainer(tmp_path, **PLAIN_RUN).args
    run = DPOTrainer(folders[0], folders[1], args, train_dataset=dataset(4))
    assert isinstance(run.ref_model, peft.PeftModel)
    run.train()
    expected = log_probs(peft.PeftModel.from_pretrained(tiny_model(seed=1), folders[1]))
    assert torch.allclose(log_probs(run.ref_model), expected)


def test_an_adapter_that_names_no_base_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    file = Path(folders[1], "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"does not name its base model.*PeftModel.from_pretrained"):
        trainer(tmp_path, model=folders[1])


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_model_under_the_adapters_is_not_another_model(tmp_path: Path) -> None:
    """``ref_model=base`` after an adapter was put on ``base``: freezing it would freeze the adapter."""
    base = tiny_model(seed=1)
    args = trainer(tmp_path, **PLAIN_RUN).args
    run = DPOTrainer(
        base, base, args, train_dataset=dataset(4), processing_class=word_tokenizer(), peft_config=lora()()
    )
    assert isinstance(run.model_reference, AdapterOff)
    assert_trains_as_defined(run)


def test_a_named_adapter_is_the_reference(tmp_path: Path) -> None:
    options = {"model_adapter_name": "second", "ref_adapter_name": "first"}
    model = several()
    model.set_adapter("first")
    expected = log_probs(model, 2)
    run = trainer(tmp_path, model=model, **PLAIN_RUN, **options)
    assert isinstance(run.model_reference, NamedAdapter)
    own = log_probs(run.model, 2)
    run.train()
    reward = 0.1 * (own - expected)[0].mean().item()
    assert run.state.log_history[0]["rewards/chosen"] == pytest.approx(reward, rel=1e-3)
    assert all(".second." in name for name in trained_names(run.model))


def test_force_use_ref_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=with_adapter(), force_use_ref_model=True, **PLAIN_RUN)
    assert isinstance(run.model_reference, SeparateModel)
    assert_trains_as_defined(run)


# -- what does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, False])
def test_a_prefix_is_not_recomputed(chosen: bool | None, tmp_path: Path) -> None:
    """Layers that compute twice drop the cache that the prefix is: left open, checkpointing stays off."""
    options = {} if chosen is None else {"gradient_checkpointing": chosen}
    kind = KINDS["prefix tuning"]
    run = trainer(tmp_path, model=kind.made(), peft_config=kind.config(), **{**PLAIN_RUN, **options})
    assert_trains_as_defined(run)


def test_a_prefix_with_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True: the adapter 'default' is a cache"):
        run_of(tmp_path, KINDS["prefix tuning"], gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            lambda: with_adapter(),
            tuner("IA3Config", feedforward_modules=["down_proj"]),
            "of type IA3 cannot act together",
        ),
        (lambda: with_adapter(modules_to_save=["lm_head"]), lora(modules_to_save=["lm_head"]), "only one of the two"),
    ],
    ids=["another kind", "one module twice"],
)
def test_adapters_that_cannot_be_stacked(model: Any, config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model(), peft_config=config())


def test_a_frozen_adapter_is_refused_with_the_way_to_train_it(tmp_path: Path) -> None:
    model = with_adapter()
    model.requires_grad_(False)
    run = trainer(tmp_path, model=model, eval_dataset=dataset(2), **PLAIN_RUN)
    assert run.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"No weight of the model is trainable.*is_trainable=True"):
        run.train()


def test_an_adapter_that_mixes_the_rows_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Lily, whose routers average over all tokens of a batch"):
        trainer(tmp_path, peft_config=tuner("LilyConfig")())
