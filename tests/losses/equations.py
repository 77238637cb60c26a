"""The papers' equations in plain Python floats, one pair at a time.

Written from the equations and with nothing of the package: no tensor, no vectorisation, no numerically safer form. So
an agreement says that the package computes the published loss, for inputs that are small enough for ``math.exp``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One completion: log p and log p_ref summed over its tokens, |y|."""

    logp: float
    ref: float = 0.0
    length: float = 1.0

    @property
    def log_ratio(self) -> float:
        return self.logp - self.ref

    @property
    def mean_logp(self) -> float:
        return self.logp / self.length


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def minus_log_sigma(x: float) -> float:
    return math.log(1 + math.exp(-x))


# the divergences of table 1 of f-DPO (arXiv:2309.16240): f(u), and the constant that makes f'(1) what the package has


def f_reverse_kl(u: float) -> float:
    return u * math.log(u) - u


def f_forward_kl(u: float) -> float:
    return -math.log(u) + u


def f_js_divergence(u: float) -> float:
    return u * math.log(u) - (u + 1) * math.log((u + 1) / 2)


def f_alpha_divergence(u: float, alpha: float) -> float:
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def score_reverse_kl(u: float) -> float:
    return math.log(u)


def score_forward_kl(u: float) -> float:
    return 1 - 1 / u


def score_js_divergence(u: float) -> float:
    return math.log(2 * u / (1 + u))


def score_alpha_divergence(u: float, alpha: float) -> float:
    return (1 - u**-alpha) / alpha


# losses of a margin


def logistic(z: float, eps: float) -> float:
    """Cross-entropy of sigma(z) with a label that is 1 with probability 1 - eps."""
    p = sigma(z)
    return -((1 - eps) * math.log(p) + eps * math.log(1 - p))


def sigmoid(margin: float, *, beta: float, label_smoothing: float = 0.0) -> float:
    return logistic(beta * margin, label_smoothing)


sigmoid_norm = sigmoid


def hinge(margin: float, *, beta: float) -> float:
    return max(0.0, 1 - beta * margin)


def ipo(margin: float, *, beta: float) -> float:
    return (margin - 1 / (2 * beta)) ** 2


def exo_pair(margin: float, *, beta: float, label_smoothing: float) -> float:
    """KL(p || q) with p the policy's preference and q the smoothed label."""
    policy = [sigma(beta * margin), 1 - sigma(beta * margin)]
    label = [1 - label_smoothing, label_smoothing]
    return sum(p * math.log(p / q) for p, q in zip(policy, label, strict=True))


def robust(margin: float, *, beta: float, label_smoothing: float) -> float:
    right, flipped = minus_log_sigma(beta * margin), minus_log_sigma(-beta * margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop(margin: float, *, beta: float, tau: float) -> float:
    z = beta * margin
    modulation = sigma(z / tau)
    return (1 - modulation) * minus_log_sigma(z) + modulation * math.exp(-z)


def simpo(margin: float, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> float:
    return logistic(beta * margin - gamma, label_smoothing)


tpo_l = simpo


# losses of two log-ratios


def nca_pair(d_w: float, d_l: float, *, beta: float) -> float:
    rewards = (beta * d_w, beta * d_l)
    return minus_log_sigma(rewards[0]) + 0.5 * sum(minus_log_sigma(-reward) for reward in rewards)


def bco_pair(d_w: float, d_l: float, *, beta: float, shift: float = 0.0) -> float:
    """Binary cross-entropy of a classifier with the shifted reward as its logit."""
    return -math.log(sigma(beta * d_w - shift)) - math.log(1 - sigma(beta * d_l - shift))


def sppo_hard(d_w: float, d_l: float, *, beta: float) -> float:
    """(log-ratio - eta (P - 1/2))^2 with eta = 1 / beta, for win rates P of 1 and 0."""
    return (d_w - (1 - 0.5) / beta) ** 2 + (d_l - (0 - 0.5) / beta) ** 2


def apo_zero(d_w: float, d_l: float, *, beta: float) -> float:
    return (1 - sigma(beta * d_w)) + sigma(beta * d_l)


def apo_down(d_w: float, d_l: float, *, beta: float) -> float:
    return sigma(beta * d_w) + (1 - sigma(beta * (d_w - d_l)))


# losses of sorted values: a list of pairs at a time


def aot(policy: Sequence[float], reference: Sequence[float], *, beta: float, label_smoothing: float) -> list[float]:
    quantiles = zip(sorted(policy), sorted(reference), strict=True)
    return [logistic(beta * (u - v), label_smoothing) for u, v in quantiles]


aot_unpaired = aot


# what is done to log-probs before


def alpha_reward(logp: float, alpha: float) -> float:
    """AlphaPO's reward of a likelihood p."""
    p = math.exp(logp)
    return (1 - p**-alpha) / alpha


def ld_logp(token_logps: Sequence[float], public_length: int, ld_alpha: float) -> float:
    return sum(token_logps[:public_length]) + ld_alpha * sum(token_logps[public_length:])


def wpo_weight(token_probs: Sequence[float], sums_of_squares: Sequence[float]) -> float:
    """The geometric mean of the tokens' aligned likelihoods."""
    product = math.prod(p / s for p, s in zip(token_probs, sums_of_squares, strict=True))
    return product ** (1 / len(token_probs))


# a method's loss of one pair, from its completions


def dpo_pair(name: str, w: Completion, lo: Completion, score, hyper: dict) -> float:
    """A DPO loss that is a function of one pair; ``score`` is s(d)."""
    hyper = dict(hyper)
    if name in ("ipo", "sigmoid_norm"):
        return globals()[name](score(w.log_ratio) / w.length - score(lo.log_ratio) / lo.length, **hyper)
    if name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
        return globals()[name](w.log_ratio, lo.log_ratio, **hyper)
    return globals()[name](score(w.log_ratio) - score(lo.log_ratio), **hyper)


def reference_free_pair(name: str, w: Completion, lo: Completion, alpha: float, hyper: dict) -> float:
    """A CPO or TPO loss of one pair, without its NLL."""
    function = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "simpo": simpo, "alphapo": simpo, "tpo-l": tpo_l}[name]
    if alpha:
        return function(alpha_reward(w.mean_logp, alpha) - alpha_reward(lo.mean_logp, alpha), **hyper)
    if name in ("ipo", "simpo", "alphapo", "tpo-l"):
        return function(w.mean_logp - lo.mean_logp, **hyper)
    return function(w.logp - lo.logp, **hyper)
