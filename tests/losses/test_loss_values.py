"""Hand-worked values. Inputs are chosen so that sigmoid is a fraction: sigmoid(ln 3) = 3/4, sigmoid(2 ln 3) = 9/10."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt import losses

LN2, LN3 = math.log(2), math.log(3)
LN43, LN4 = math.log(4 / 3), math.log(4)


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def check(actual: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, values(*expected), rtol=1e-12, atol=1e-12)


def test_smoothed_logistic():
    """z = ln 3: -log(3/4) for the right label, -log(1/4) for the wrong one."""
    check(losses.smoothed_logistic(values(0, LN3, -LN3)), LN2, LN43, LN4)
    check(losses.smoothed_logistic(values(0, LN3), label_smoothing=0.1), LN2, 0.9 * LN43 + 0.1 * LN4)


@pytest.mark.parametrize("loss", [losses.sigmoid, losses.sigmoid_norm])
def test_sigmoid(loss):
    """beta = 1/2, margin 2 ln 3: z = ln 3; with eps = 1/4 the wrong label's share is a quarter."""
    check(loss(values(0, 2 * LN3, -2 * LN3), beta=0.5), LN2, LN43, LN4)
    check(loss(values(2 * LN3), beta=0.5, label_smoothing=0.25), 0.75 * LN43 + 0.25 * LN4)


def test_hinge():
    """beta = 1/2: 1 - 1/2, 1 - 2 cut off at 0, 1 + 2."""
    check(losses.hinge(values(1, 4, -4, 0), beta=0.5), 0.5, 0, 3, 1)


def test_ipo():
    """beta = 1/4: the target is 2, so 0, (5 - 2)^2, (-1 - 2)^2."""
    check(losses.ipo(values(2, 5, -1), beta=0.25), 0, 9, 9)


def test_exo_pair():
    """eps = 1/4: at z = ln 3 the policy's (3/4, 1/4) is the label; at -ln 3 it is 1/4 ln(1/3) + 3/4 ln 3."""
    check(losses.exo_pair(values(2 * LN3, -2 * LN3), beta=0.5, label_smoothing=0.25), 0, 0.5 * LN3)


def test_robust():
    """eps = 1/4, z = ln 3: (3/4 ln(4/3) - 1/4 ln 4) / (1/2); at 0: (1/2) ln 2 / (1/2)."""
    expected = 1.5 * LN43 - 0.5 * LN4
    check(losses.robust(values(2 * LN3, 0), beta=0.5, label_smoothing=0.25), expected, LN2)


def test_discopop():
    """z = ln 3: e^-z = 1/3; tau = 1: m = 3/4; tau = 1/2: m = 9/10. z = -ln 3, tau = 1/2: m = 1/10, e^-z = 3."""
    check(losses.discopop(values(2 * LN3, 0), beta=0.5, tau=1.0), 0.25 * LN43 + 0.25, (LN2 + 1) / 2)
    check(losses.discopop(values(2 * LN3, -2 * LN3), beta=0.5, tau=0.5), 0.1 * LN43 + 0.3, 0.9 * LN4 + 0.3)


@pytest.mark.parametrize("loss", [losses.simpo, losses.tpo_l])
def test_simpo(loss):
    """beta = 2, gamma = ln 3: z = 2 ln 3 - ln 3, 0 - ln 3, ln 3 - ln 3."""
    check(loss(values(LN3, 0, LN3 / 2), beta=2.0, gamma=LN3), LN43, LN4, LN2)
    check(loss(values(LN3), beta=2.0, gamma=LN3, label_smoothing=0.25), 0.75 * LN43 + 0.25 * LN4)


def test_nca_pair():
    """Rewards (ln 3, -ln 3): ln(4/3) + ln(4)/2 + ln(4/3)/2; (ln 3, ln 3): the last is ln(4)/2; (-ln 3, 0)."""
    actual = losses.nca_pair(values(2 * LN3, 2 * LN3, -2 * LN3), values(-2 * LN3, 2 * LN3, 0), beta=0.5)
    check(actual, 1.5 * LN43 + 0.5 * LN4, LN43 + LN4, LN4 + 0.5 * LN43 + 0.5 * LN2)


def test_bco_pair():
    """Rewards (ln 3, -ln 3): 2 ln(4/3); (ln 3, 0): ln(4/3) + ln 2; shifted by ln 3, (2 ln 3, 0) is (ln 3, -ln 3)."""
    check(losses.bco_pair(values(2 * LN3, 2 * LN3), values(-2 * LN3, 0), beta=0.5), 2 * LN43, LN43 + LN2)
    check(losses.bco_pair(values(4 * LN3, 2 * LN3), values(0, 0), beta=0.5, shift=LN3), 2 * LN43, LN2 + LN43)


def test_sppo_hard():
    """beta = 1/4: targets 2 and -2: (5 - 2)^2 + (-1 + 2)^2, 0, (0 - 2)^2 + (4 + 2)^2."""
    check(losses.sppo_hard(values(5, 2, 0), values(-1, -2, 4), beta=0.25), 10, 0, 40)


def test_apo_zero():
    """Rewards (ln 3, -ln 3): 1/4 + 1/4; (ln 3, ln 3): 1/4 + 3/4; (-ln 3, ln 3): 3/4 + 3/4."""
    chosen, rejected = values(2 * LN3, 2 * LN3, -2 * LN3), values(-2 * LN3, 2 * LN3, 2 * LN3)
    check(losses.apo_zero(chosen, rejected, beta=0.5), 0.5, 1, 1.5)


def test_apo_down():
    """Rewards (ln 3, 0): 3/4 + 1/4; (ln 3, 2 ln 3): 3/4 + 3/4; (ln 3, -ln 3): 3/4 + (1 - 9/10)."""
    chosen, rejected = values(2 * LN3, 2 * LN3, 2 * LN3), values(0, 4 * LN3, -2 * LN3)
    check(losses.apo_down(chosen, rejected, beta=0.5), 1, 1.5, 0.85)


@pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired])
def test_aot(loss):
    """(2 ln 3, 0) against (-2 ln 3, 0): sorted, (0, 2 ln 3) - (-2 ln 3, 0) = (2 ln 3, 2 ln 3); unsorted (4 ln 3, 0)."""
    check(loss(values(2 * LN3, 0), values(-2 * LN3, 0), beta=0.5), LN43, LN43)
    check(loss(values(2 * LN3, -2 * LN3), values(0, 0), beta=0.5), LN4, LN43)
    smoothed = loss(values(0, 2 * LN3), values(0, 0), beta=0.5, label_smoothing=0.25)
    check(smoothed, LN2, 0.75 * LN43 + 0.25 * LN4)


def test_ascending():
    """Where each element of the sorted values stood; of equal ones the earlier comes first."""
    assert losses.ascending(values(3, 1, 2, 1)).tolist() == [1, 3, 2, 0]


def test_nll():
    check(losses.nll(values(-0.5, -2)), 0.5, 2)


def test_divergence_scores():
    """u = 3 and u = 1/3; log 3, 1 - 1/3 and 1 - 3, log(6/4) and log((2/3)/(4/3)), (1 - 1/sqrt(3)) / (1/2)."""
    log_ratio = values(LN3, -LN3, 0)
    check(losses.reverse_kl(log_ratio), LN3, -LN3, 0)
    check(losses.forward_kl(log_ratio), 2 / 3, -2, 0)
    check(losses.js_divergence(log_ratio), math.log(1.5), math.log(0.5), 0)
    check(losses.alpha_divergence(log_ratio, coef=0.5), 2 - 2 / math.sqrt(3), 2 - 2 * math.sqrt(3), 0)


def test_alpha_shape():
    """p = 1/3, alpha = 2: (1 - 9) / 2; alpha = -1: (1 - 1/3) / -1; alpha = 0: log p."""
    check(losses.alpha_shape(values(-LN3), alpha=2.0), -4)
    check(losses.alpha_shape(values(-LN3), alpha=-1.0), -2 / 3)
    check(losses.alpha_shape(values(-LN3), alpha=0.0), -LN3)


def test_ld_token_weights():
    """m = 2 for a completion of 4 tokens, m = 3 for one of 3."""
    position, public = torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.tensor([2, 2, 2, 2, 3, 3, 3])
    assert losses.ld_token_weights(position, public, ld_alpha=0.25).tolist() == [1, 1, 0.25, 0.25, 1, 1, 1]


def test_wpo_token_log_weights():
    """p = (1/2, 1/4, 1/4): sum of squares 3/8; 1/2 over it is 4/3, 1/4 over it 2/3; and no gradient."""
    logps = values(math.log(1 / 2), math.log(1 / 4)).requires_grad_()
    actual = losses.wpo_token_log_weights(logps, values(math.log(3 / 8), math.log(3 / 8)))
    check(actual, LN43, math.log(2 / 3))
    assert not actual.requires_grad
