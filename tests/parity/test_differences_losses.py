"""Losses in which prefopt and TRL 1.16 differ: both numbers, and a calculation of its own that says which is right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from independent import lengths, score_rows, sums, token_mean
from parity_harness import POLICY, REFERENCE, RELATIVE, build, classes, run
from tiny_models import standard_rows, tiny_model, word_tokenizer
from torch import Tensor

pytestmark = pytest.mark.trl

PAIRS = 4


def first_step(library: str, method: str, config: dict[str, Any]) -> dict[str, float]:
    reference = {"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}
    return run(library, method, {**config, "max_steps": 1}, **reference)[0]


def exact() -> dict[str, Any]:
    """The first four rows, scored by policy and reference."""
    rows = standard_rows()
    return {
        name: score_rows(tiny_model(**settings), word_tokenizer(), rows, pairs=PAIRS)
        for name, settings in (("policy", POLICY), ("reference", REFERENCE))
    }


def log_ratios(scores: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[P] d_w and d_l."""
    policy, reference = scores["policy"], scores["reference"]
    d_w, d_l = (sums(policy[side]) - sums(reference[side]) for side in ("chosen", "rejected"))
    return d_w, d_l


def smoothed(z: Tensor, smoothing: float) -> float:
    return float((-(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)).mean())


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_acts(loss_type: str) -> None:
    """cDPO: TRL ignores ``label_smoothing`` here and trains on the loss without it."""
    config = {"loss_type": loss_type, "label_smoothing": 0.2, "beta": 0.5}
    scores = exact()
    d_w, d_l = log_ratios(scores)
    if loss_type == "sigmoid_norm":
        d_w, d_l = d_w / lengths(scores["policy"]["chosen"]), d_l / lengths(scores["policy"]["rejected"])
    z = 0.5 * (d_w - d_l)
    assert first_step("prefopt", "dpo", config)["loss"] == pytest.approx(smoothed(z, 0.2), rel=RELATIVE)
    theirs = first_step("trl", "dpo", config)["loss"]
    assert theirs == pytest.approx(smoothed(z, 0.0), rel=RELATIVE)
    assert theirs != pytest.approx(smoothed(z, 0.2), rel=10 * RELATIVE)


def test_alpha_divergence_is_the_papers() -> None:
    """f-DPO: s(d) = (1 - e^(-a d)) / a. TRL's coefficient is 1 - a; the two agree at the default 0.5 alone."""
    config = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2, "beta": 0.1}
    d_w, d_l = log_ratios(exact())
    scores = [(1 - torch.exp(-0.2 * d)) / 0.2 for d in (d_w, d_l)]
    ours = first_step("prefopt", "dpo", config)["loss"]
    assert ours == pytest.approx(smoothed(0.1 * (scores[0] - scores[1]), 0.0), rel=RELATIVE)
    assert first_step("trl", "dpo", config)["loss"] != pytest.approx(ours, rel=10 * RELATIVE)
    mirrored = first_step("trl", "dpo", {**config, "f_alpha_divergence_coef": 0.8})["loss"]
    assert mirrored == pytest.approx(ours, rel=RELATIVE)


def test_wpo_goes_with_sft() -> None:
    """MPO with WPO: the pair losses are weighted, the NLL is not. TRL fails in an in-place multiplication."""
    config = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5], "use_weighting": True}
    scores = exact()
    d_w, d_l = log_ratios(scores)
    both = zip(scores["policy"]["chosen"], scores["policy"]["rejected"], strict=True)
    weight = torch.tensor([math.exp(chosen.log_weight + rejected.log_weight) for chosen, rejected in both])
    expected = 0.8 * float((-F.logsigmoid(0.1 * (d_w - d_l)) * weight).mean())
    expected += 0.5 * token_mean(scores["policy"]["chosen"])
    assert first_step("prefopt", "dpo", config)["loss"] == pytest.approx(expected, rel=RELATIVE)
    with pytest.raises(RuntimeError, match="single memory location"):
        first_step("trl", "dpo", config)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_sorted_losses_see_the_whole_step(loss_type: str) -> None:
    """Four pairs at once, and two by two: TRL sorts each micro-batch by itself, which is another loss."""

    def losses(library: str) -> list[float]:
        config = {"loss_type": [loss_type], "beta": 1.0, "max_steps": 1}
        splits = [{"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts} for parts in (1, 2)]
        models = [{"ref_model": tiny_model(**REFERENCE)} for _ in splits]
        return [run(library, "dpo", {**config, **splits[i]}, **models[i])[0]["loss"] for i in range(2)]

    ours, theirs = losses("prefopt"), losses("trl")
    assert ours[0] == pytest.approx(theirs[0], rel=RELATIVE)
    assert ours[1] == pytest.approx(ours[0], rel=RELATIVE)
    assert theirs[1] != pytest.approx(theirs[0], rel=10 * RELATIVE)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_wpo_goes_with_sorted_losses(loss_type: str) -> None:
    """The weights follow the sorted elements they belong to. TRL refuses the combination."""
    config = {"loss_type": loss_type, "use_weighting": True}
    scores = exact()
    policy, reference = scores["policy"], scores["reference"]
    log_weights = [torch.tensor([c.log_weight for c in policy[side]]) for side in ("chosen", "rejected")]
    if loss_type == "aot":
        order, ratio = torch.sort(sums(policy["chosen"]) - sums(policy["rejected"]))[::-1]
        u = ratio - torch.sort(sums(reference["chosen"]) - sums(reference["rejected"]))[0]
        log_weight = (log_weights[0] + log_weights[1])[order]
    else:
        (s_w, order_w), (s_l, order_l) = (torch.sort(d) for d in log_ratios(scores))
        u, log_weight = s_w - s_l, log_weights[0][order_w] + log_weights[1][order_l]
    expected = float((-F.logsigmoid(0.1 * u) * log_weight.exp()).mean())
    assert first_step("prefopt", "dpo", config)["loss"] == pytest.approx(expected, rel=RELATIVE)
    with pytest.raises(NotImplementedError, match="not implemented for 'aot'"):
        build("trl", "dpo", config, ref_model=tiny_model(**REFERENCE))


def test_forward_kl_stays_finite() -> None:
    """A policy far from its reference: e^-d overflows float32 in TRL, whose log then shows a loss of 0."""
    config = {"f_divergence_type": "forward_kl", "max_steps": 1}

    def first(library: str) -> dict[str, float]:
        far = tiny_model(**POLICY)
        with torch.no_grad():
            far.lm_head.weight.mul_(10)
        return run(library, "dpo", config, model=far, ref_model=tiny_model(**REFERENCE))[0]

    theirs, ours = first("trl"), first("prefopt")
    assert not math.isfinite(theirs["grad_norm"])
    assert math.isfinite(ours["loss"])
    assert math.isfinite(ours["grad_norm"])
    assert ours["rewards/chosen"] == pytest.approx(theirs["rewards/chosen"], rel=RELATIVE)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_alpha_of_cpo_acts_on_the_mean_log_prob(loss_type: str) -> None:
    """AlphaPO is defined on the length-normalised likelihood. TRL takes the sum here: p^-alpha explodes."""
    config = {"loss_type": loss_type, "alpha": 0.5, "cpo_alpha": 0.0, "beta": 0.1}
    policy = exact()["policy"]
    r_w, r_l = (
        -torch.expm1(-0.5 * sums(policy[side]) / lengths(policy[side])) / 0.5 for side in ("chosen", "rejected")
    )
    z = 0.1 * (r_w - r_l)
    expected = smoothed(z, 0.0) if loss_type == "sigmoid" else float(torch.relu(1 - z).mean())
    ours = first_step("prefopt", "cpo", config)
    assert ours["loss"] == pytest.approx(expected, rel=RELATIVE)
    assert ours["rewards/chosen"] == pytest.approx(0.1 * float(r_w.mean()), rel=RELATIVE)
    theirs = first_step("trl", "cpo", config)
    assert abs(theirs["rewards/chosen"]) > 1e3 * abs(ours["rewards/chosen"])


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_an_unknown_loss_is_refused_when_the_config_is_made(method: str, tmp_path: Path) -> None:
    """TRL finds out in the first training step, after the model was loaded and the data tokenised."""
    theirs, ours = (classes(library, method)[0] for library in ("trl", "prefopt"))
    assert "sigmiod" in theirs(str(tmp_path), loss_type="sigmiod", bf16=False).loss_type
    with pytest.raises(ValueError, match="sigmiod"):
        ours(str(tmp_path), loss_type="sigmiod", bf16=False)
