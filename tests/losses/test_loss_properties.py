"""What must hold of each loss whatever the numbers, and that extreme numbers stay finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES, IDS, LOG_RATIOS, MARGIN, loss_of

from prefopt import losses

AT_AGREEMENT = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1,
    "ipo": 25,
    "robust": math.log(2),
    "discopop": (math.log(2) + 1) / 2,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1,
    "apo_down": 1,
}
"""Loss at beta 0.1 where policy and reference agree."""


def margins(seed: int = 0, num_pairs: int = 64) -> torch.Tensor:
    return 5 * torch.randn(num_pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", AT_AGREEMENT)
def test_value_where_policy_and_reference_agree(name):
    hyper = next(hyper for case, hyper in CASES if case == name and "shift" not in hyper)
    actual = loss_of(name, torch.zeros(2, 3, dtype=torch.float64), {**hyper, "beta": 0.1})
    torch.testing.assert_close(actual, torch.full((3,), AT_AGREEMENT[name], dtype=torch.float64))


@pytest.mark.parametrize("loss", [losses.sigmoid, losses.sigmoid_norm])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_sigmoid_is_odd_up_to_its_slope(loss, eps):
    """L(d) - L(-d) = -(1 - 2 eps) beta d."""
    d = margins()
    difference = loss(d, beta=0.3, label_smoothing=eps) - loss(-d, beta=0.3, label_smoothing=eps)
    torch.testing.assert_close(difference, -(1 - 2 * eps) * 0.3 * d)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_smoothed_sigmoid_is_least_where_the_policy_is_as_sure_as_the_label(eps):
    """sigmoid(beta d) = 1 - eps at the minimum."""
    best = torch.tensor([math.log((1 - eps) / eps) / 0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.sigmoid(best, beta=0.1, label_smoothing=eps).sum(), best)
    assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_exo_pair_is_zero_where_the_policy_is_as_sure_as_the_label_and_positive_elsewhere(eps):
    best = math.log((1 - eps) / eps) / 0.1
    assert losses.exo_pair(torch.tensor([best]), beta=0.1, label_smoothing=eps).item() == pytest.approx(0, abs=1e-6)
    assert (losses.exo_pair(margins(1), beta=0.1, label_smoothing=eps) > 0).all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_ipo_is_least_at_half_the_inverse_of_beta(beta):
    target = torch.tensor([1 / (2 * beta)], dtype=torch.float64)
    assert losses.ipo(target, beta=beta).item() == 0
    step = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(losses.ipo(target + step, beta=beta), step.square())


def test_hinge_has_no_gradient_beyond_its_margin():
    d = torch.tensor([9.9, 10.1], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.hinge(d, beta=0.1).sum(), d)
    assert gradient.tolist() == pytest.approx([-0.1, 0])


def test_robust_without_flips_is_sigmoid():
    d = margins(2)
    torch.testing.assert_close(losses.robust(d, beta=0.2, label_smoothing=0.0), losses.sigmoid(d, beta=0.2))


def test_robust_is_unbiased():
    """Over labels flipped with probability eps, the expected robust loss is the loss of the clean label."""
    d, eps = margins(3), 0.2
    kept, flipped = (losses.robust(sign * d, beta=0.2, label_smoothing=eps) for sign in (1, -1))
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, losses.sigmoid(d, beta=0.2))


def test_discopop_switches_from_logistic_to_exponential():
    """With tau -> 0 it is -log sigmoid(z) left of 0 and e^-z right of it."""
    z = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([math.log(1 + math.exp(3)), math.exp(-3)], dtype=torch.float64)
    torch.testing.assert_close(losses.discopop(z, beta=1.0, tau=1e-3), expected)


@pytest.mark.parametrize("tau", [0.05, 0.5, 0.95])
def test_discopop_far_left_is_logistic(tau):
    """m e^-z = e^(z / tau - z) vanishes, though e^-z alone is infinite."""
    z = torch.tensor([-2000.0], requires_grad=True)
    loss = losses.discopop(z, beta=1.0, tau=tau)
    assert loss.item() == pytest.approx(2000)
    assert torch.autograd.grad(loss.sum(), z)[0].item() == pytest.approx(-1)


def test_simpo_without_target_is_sigmoid_and_its_target_shifts_it():
    d = margins(4)
    torch.testing.assert_close(losses.simpo(d, beta=2.0, gamma=0.0), losses.sigmoid(d, beta=2.0))
    torch.testing.assert_close(losses.simpo(d + 0.35, beta=2.0, gamma=0.7), losses.sigmoid(d, beta=2.0))
    assert torch.equal(losses.simpo(d, beta=2.0, gamma=0.7), losses.tpo_l(d, beta=2.0, gamma=0.7))


def test_alphapo_tends_to_simpo():
    """The difference shrinks in proportion to alpha, down to none at all at 0."""
    logps = -margins(5).abs().reshape(2, -1)

    def loss(alpha: float) -> torch.Tensor:
        chosen, rejected = losses.alpha_shape(logps, alpha=alpha)
        return losses.simpo(chosen - rejected, beta=2.0, gamma=0.5)

    plain = losses.simpo(logps[0] - logps[1], beta=2.0, gamma=0.5)
    differences = [(loss(alpha) - plain).abs().max().item() for alpha in (1e-3, 1e-4, 1e-5, 1e-6)]
    assert differences[0] > 1e-3
    for larger, smaller in itertools.pairwise(differences):
        assert smaller == pytest.approx(larger / 10, rel=0.1)
    assert torch.equal(loss(0.0), plain)
    torch.testing.assert_close(loss(1e-13), plain)


@pytest.mark.parametrize("alpha", [1e-50, 1e-9, -1e-9, 1e-13, 0.0])
def test_alpha_shape_keeps_its_digits_near_zero_in_float32(alpha):
    x = torch.tensor([-3.0, -0.1, 0.2])
    torch.testing.assert_close(losses.alpha_shape(x, alpha=alpha), x, rtol=1e-6, atol=0)


def test_alpha_shape_takes_its_formula_as_soon_as_float64_can_tell():
    """At alpha = 1e-9 the curvature alpha x^2 / 2 is visible in float64; at 1e-13 the identity is returned."""
    x = torch.tensor([100.0], dtype=torch.float64)
    assert (losses.alpha_shape(x, alpha=1e-9) - x).item() == pytest.approx(-1e-9 * 100**2 / 2, rel=1e-3)
    assert torch.equal(losses.alpha_shape(x, alpha=1e-13), x)
    assert torch.equal(losses.alpha_shape(x, alpha=-1e-13), x)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_exponents_are_clamped_at_40(alpha):
    bound = -(math.exp(40) - 1) / alpha
    x = torch.tensor([-40.5, -1e4], dtype=torch.float64, requires_grad=True)
    shaped = losses.alpha_shape(x / alpha, alpha=alpha)
    assert shaped.tolist() == pytest.approx([bound, bound])
    assert torch.autograd.grad(shaped.sum(), x)[0].tolist() == [0, 0]
    just_inside = losses.alpha_shape(torch.tensor([-39.5 / alpha], dtype=torch.float64), alpha=alpha)
    assert just_inside.item() == pytest.approx(-(math.exp(39.5) - 1) / alpha)


def test_divergences_meet():
    """alpha = 0 is reverse KL, alpha = 1 forward KL; all scores are 0 with slope 1 (js: 1/2) at d = 0."""
    d = margins(6)
    assert torch.equal(losses.alpha_divergence(d, coef=0.0), losses.reverse_kl(d))
    assert torch.equal(losses.alpha_divergence(d, coef=1.0), losses.forward_kl(d))
    slopes = {losses.reverse_kl: 1, losses.forward_kl: 1, losses.js_divergence: 0.5}
    for score, slope in slopes.items():
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        assert score(zero).item() == pytest.approx(0)
        assert torch.autograd.grad(score(zero).sum(), zero)[0].item() == pytest.approx(slope)


def test_paper_and_trl_alpha_meet_at_one_half():
    """TRL's (e^((a - 1) d) - 1) / (a - 1) at a is the paper's score at 1 - a."""
    d = margins(7)
    for a in (0.2, 0.5, 0.9):
        trl = torch.expm1((a - 1) * d) / (a - 1)
        torch.testing.assert_close(losses.alpha_divergence(d, coef=1 - a), trl)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_of_one_pair_are_sigmoid_and_forget_the_order(name):
    pair = margins(8).reshape(2, -1)
    loss = getattr(losses, name)
    for w, lo in pair.T[:4]:
        single = loss(w[None], lo[None], beta=0.3, label_smoothing=0.1)
        torch.testing.assert_close(single, losses.sigmoid((w - lo)[None], beta=0.3, label_smoothing=0.1))
    permuted = pair[:, torch.randperm(pair.shape[1], generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(loss(*permuted, beta=0.3), loss(*pair, beta=0.3))
    torch.testing.assert_close(loss(pair[0], permuted[1], beta=0.3), loss(*pair, beta=0.3))


def test_bco_shift_moves_both_rewards():
    pair = margins(9).reshape(2, -1)
    shifted = losses.bco_pair(*(pair + 3.0), beta=0.2, shift=torch.tensor(0.6))
    torch.testing.assert_close(shifted, losses.bco_pair(*pair, beta=0.2))


@pytest.mark.parametrize("name", [name for name in (*MARGIN, *LOG_RATIOS) if name != "discopop"])
def test_a_loss_pulls_the_pair_apart(name):
    """From agreement: down with chosen (apo_down lets it be), up with rejected."""
    hyper = next(hyper for case, hyper in CASES if case == name)
    pair = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    chosen, rejected = torch.autograd.grad(loss_of(name, pair, hyper).sum(), pair)[0].flatten().tolist()
    assert chosen == pytest.approx(0) if name == "apo_down" else chosen < 0
    assert rejected > 0


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_discopop_is_not_monotonic_at_agreement(tau):
    """dL/dz = m' (1 - ln 2) - 1/4 - 1/2 with m' = 1 / (4 tau): up for the published tau, down for a larger one."""
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.discopop(z, beta=1.0, tau=tau).sum(), z)
    assert slope.item() == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75)


EXTREMES = [-1e4, -500.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 500.0, 1e4]


@pytest.mark.parametrize(("name", "hyper"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(name, hyper, dtype):
    pair = torch.tensor(list(itertools.product(EXTREMES, EXTREMES)), dtype=dtype).T.clone().requires_grad_()
    loss = loss_of(name, pair, hyper)
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), pair)
    assert gradient.isfinite().all()


SCORES = {
    "forward_kl": losses.forward_kl,
    "js_divergence": losses.js_divergence,
    "alpha_divergence": lambda d: losses.alpha_divergence(d, coef=0.5),
    "negative_alpha": lambda d: losses.alpha_divergence(d, coef=-0.5),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", MARGIN)
def test_extreme_scores_stay_finite(name, score):
    """A margin of clamped scores reaches 2e17: squares and exponentials of it must not overflow float32."""
    hyper = next(hyper for case, hyper in CASES if case == name)
    pair = torch.tensor(list(itertools.product(EXTREMES, EXTREMES))).T.clone().requires_grad_()
    loss = loss_of(name, SCORES[score](pair), hyper)
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), pair)
    assert gradient.isfinite().all()
