"""DPO in prefopt and in TRL 1.16: three optimizer steps with the same log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from parity_harness import POLICY, REFERENCE, assert_same_row, compare, evaluate, run
from tiny_models import conversational_rows, implicit, standard_rows, tiny_model

pytestmark = pytest.mark.trl

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
    "sft": {},
    "sigmoid_norm": {"beta": 2.0},
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def with_reference() -> dict[str, Any]:
    """A reference that is another model: log-ratios, rewards and margins are not zero at the first step."""
    return {"ref_model": tiny_model(**REFERENCE)}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss(loss_type: str) -> None:
    compare("dpo", {"loss_type": loss_type, **LOSSES[loss_type]}, arguments=with_reference)


def test_mpo() -> None:
    compare("dpo", MPO, arguments=with_reference)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_f_divergence(divergence: str, loss_type: str) -> None:
    beta = 0.02 if loss_type == "sigmoid" else 0.3
    config = {"loss_type": loss_type, "f_divergence_type": divergence, "beta": beta}
    compare("dpo", config, arguments=with_reference)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair"])
def test_ld(loss_type: str) -> None:
    compare("dpo", {"loss_type": loss_type, "ld_alpha": 0.3}, arguments=with_reference)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "bco_pair"])
def test_wpo(loss_type: str) -> None:
    compare("dpo", {"loss_type": loss_type, "use_weighting": True}, arguments=with_reference)


def test_reference_is_a_snapshot_of_the_policy(policy_path: str) -> None:
    ours, _ = compare("dpo", {}, arguments=lambda: {"model": policy_path})
    assert ours[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert abs(ours[2]["rewards/margins"]) > 1e-3


def test_tr_dpo(policy_path: str) -> None:
    config = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
    ours, _ = compare("dpo", config, arguments=lambda: {"model": policy_path})
    fixed = run("prefopt", "dpo", {}, model=policy_path)
    moved = abs(ours[2]["rewards/margins"] - fixed[2]["rewards/margins"])
    assert moved > 1e-2, "the reference did not follow the policy"


@pytest.mark.parametrize("given", [True, False], ids=["given_reference", "own_reference"])
def test_precompute(given: bool, policy_path: str) -> None:
    config = {"precompute_ref_log_probs": True, "ld_alpha": 0.5}
    compare("dpo", config, arguments=with_reference if given else lambda: {"model": policy_path})


@pytest.mark.parametrize(("mode", "max_length"), [("keep_start", 12), ("keep_end", 14)])
def test_truncation(mode: str, max_length: int) -> None:
    cut, _ = compare("dpo", {"truncation_mode": mode, "max_length": max_length}, arguments=with_reference)
    whole = run("prefopt", "dpo", {}, **with_reference())
    assert cut[2]["num_tokens"] < whole[2]["num_tokens"]


def test_no_truncation() -> None:
    compare("dpo", {"max_length": None}, arguments=with_reference)


def test_new_adapter(policy_path: str) -> None:
    """The adapter's random weights come from the same seed, and the reference is the model without it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    compare("dpo", {}, arguments=lambda: {"model": policy_path, "peft_config": config})


def test_given_adapter(policy_path: str) -> None:
    """An adapter that is not an identity: the reference is a frozen copy of it."""
    peft = pytest.importorskip("peft")

    def arguments() -> dict[str, Any]:
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        return {"model": peft.get_peft_model(tiny_model(**POLICY), adapter)}

    ours, _ = compare("dpo", {}, arguments=arguments)
    assert ours[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_down"])
def test_accumulation(loss_type: str) -> None:
    """A loss of pairs: two micro-batches of two pairs. TRL averages token metrics over micro-batches unweighted."""
    config = {"loss_type": loss_type, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    token_means = ["entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"]
    compare("dpo", config, arguments=with_reference, without=token_means)


def test_adamw() -> None:
    compare("dpo", {"optim": "adamw_torch", "learning_rate": 1e-3}, arguments=with_reference)


@pytest.mark.parametrize("shape", ["conversational", "implicit", "conversational_implicit"])
def test_formats(shape: str) -> None:
    rows = conversational_rows() if "conversational" in shape else standard_rows()
    rows = implicit(rows) if "implicit" in shape else rows
    compare("dpo", {}, arguments=lambda: with_reference() | {"train_dataset": Dataset.from_dict(rows)})


def test_evaluation() -> None:
    """Eight rows in two equal batches; the token means are compared on one batch, where TRL weights them right."""
    for rows, without in [(8, ("eval_entropy", "eval_logits/chosen", "eval_logits/rejected")), (4, ())]:
        config = {"per_device_eval_batch_size": 4}
        data = standard_rows(rows, seed=5)
        theirs = evaluate("trl", "dpo", config, data, **with_reference())
        ours = evaluate("prefopt", "dpo", config, data, **with_reference())
        assert_same_row(ours, theirs, without=[*without, "eval_mean_token_accuracy"] if without else without)


def test_mixture_of_experts() -> None:
    """The load-balancing loss over the same tokens, with TRL's default weight (the model config's)."""
    family = {"family": "qwen3_moe", "output_router_logits": True, "router_aux_loss_coef": 0.1}
    ours, _ = compare(
        "dpo", {}, arguments=lambda: {"model": tiny_model(**family), "ref_model": tiny_model(seed=1, **family)}
    )
    assert ours[0]["aux_loss"] > 0


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """With another learning rate steps 2 and 3 differ by far more than the tolerance: the traces are not frozen."""
    moved, still = (run("prefopt", "dpo", {"learning_rate": rate}, **with_reference()) for rate in (0.3, 0.0))
    assert moved[0]["loss"] == pytest.approx(still[0]["loss"], rel=1e-5)
    for step in (1, 2):
        with pytest.raises(AssertionError, match="loss"):
            assert_same_row(moved[step], still[step], without=["learning_rate"])
