"""Each loss against its equation in plain Python, on fresh random inputs; and its gradient against differences."""

from __future__ import annotations

import math

import equations
import pytest
import torch
from cases import CASES, IDS, MARGIN, SORTED, loss_of

from prefopt import losses

SEEDS = range(4)


def random_values(seed: int, scale: float = 4.0, num_pairs: int = 16) -> torch.Tensor:
    """[2, P] float64."""
    return scale * torch.randn(2, num_pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: torch.Tensor, expected: list[float]) -> None:
    """Within what 1 - p loses in the plain equations."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "hyper"), CASES, ids=IDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_equation(name, hyper, seed):
    pair = random_values(seed)
    chosen, rejected = pair.tolist()
    equation = getattr(equations, name)
    if name in SORTED:
        expected = equation(chosen, rejected, **hyper)
    elif name in MARGIN:
        expected = [equation(w - lo, **hyper) for w, lo in zip(chosen, rejected, strict=True)]
    else:
        expected = [equation(w, lo, **hyper) for w, lo in zip(chosen, rejected, strict=True)]
    assert_equal(loss_of(name, pair, hyper), expected)


@pytest.mark.parametrize(("name", "hyper"), CASES, ids=IDS)
def test_gradient(name, hyper):
    pair = random_values(17, num_pairs=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss_of(name, values, hyper), (pair,), atol=1e-7)


DIVERGENCES = {
    "reverse_kl": (losses.reverse_kl, {}),
    "forward_kl": (losses.forward_kl, {}),
    "js_divergence": (losses.js_divergence, {}),
    "alpha_divergence": (losses.alpha_divergence, {"coef": 0.3}),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_score(name, seed):
    function, hyper = DIVERGENCES[name]
    log_ratio = random_values(seed)[0]
    equation = getattr(equations, f"score_{name}")
    assert_equal(function(log_ratio, **hyper), [equation(math.exp(d), *hyper.values()) for d in log_ratio.tolist()])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_score_is_the_derivative_of_f(name):
    """s(d) = f'(e^d), with f as in the paper's table and f' by central differences."""
    function, hyper = DIVERGENCES[name]
    f = getattr(equations, f"f_{name}")
    for d in (-2.0, -0.5, 0.0, 0.7, 1.9):
        u, h = math.exp(d), 1e-5 * math.exp(d)
        slope = (f(u + h, *hyper.values()) - f(u - h, *hyper.values())) / (2 * h)
        assert function(torch.tensor(d, dtype=torch.float64), **hyper).item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient(name):
    function, hyper = DIVERGENCES[name]
    log_ratio = random_values(5)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda d: function(d, **hyper), (log_ratio,), atol=1e-7)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 1.0, 1e-4])
def test_alpha_reward(alpha):
    logps = -random_values(3)[0].abs()
    expected = [equations.alpha_reward(logp, alpha) for logp in logps.tolist()]
    assert_equal(losses.alpha_shape(logps, alpha=alpha), expected)
