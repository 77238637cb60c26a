"""``model_init``: the model, its adapter and its reference are made anew for every run of ``train``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from short_runs import dataset
from tiny_models import tiny_model, word_tokenizer

from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer


def test_cpo_with_model_init(tmp_path: Path) -> None:
    args = CPOConfig(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", learning_rate=1e-2)
    run = CPOTrainer(
        args=args, train_dataset=dataset(), processing_class=word_tokenizer(), model_init=lambda: tiny_model(seed=1)
    )
    run.train()
    first = run.model.lm_head.weight.detach().clone()
    run.train()
    assert torch.equal(run.model.lm_head.weight, first)


def test_a_search_takes_a_fresh_reference_for_every_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    losses = []
    run = DPOTrainer(
        args=DPOConfig(str(tmp_path), max_steps=3, logging_steps=1, report_to="none", save_strategy="no"),
        train_dataset=dataset(),
        eval_dataset=dataset(5, seed=3),
        processing_class=word_tokenizer(),
        model_init=lambda: tiny_model(seed=1),
    )
    original = run.train

    def train(*args, **kwargs):
        result = original(*args, **kwargs)
        losses.append(run.state.log_history[0]["loss"])
        return result

    run.train = train
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2,
        direction="minimize",
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-5)  # each trial starts at its own reference
    assert best.objective < math.log(2)


def test_model_init_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass `processing_class` too"):
        DPOTrainer(args=DPOConfig(str(tmp_path)), train_dataset=dataset(), model_init=tiny_model)
