"""The objective: every name on real inputs against the plain equations, what it declares and what it reports."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from losses import equations
from losses.equations import Completion
from pairs import LENGTHS, make_layout, random_tokens, split_tokens

from prefopt.objective import LOSSES, build_objective
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import SequenceStats

LAYOUT = make_layout(LENGTHS)
POLICY, REFERENCE = random_tokens(LAYOUT, 10), random_tokens(LAYOUT, 11)

HYPER = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "sigmoid": {"label_smoothing": 0.1},
    "sigmoid_norm": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.3},
    "simpo": {"label_smoothing": 0.1, "gamma": 0.4},
    "alphapo": {"label_smoothing": 0.1, "gamma": 0.4},
    "tpo-l": {"label_smoothing": 0.1, "gamma": 0.4},
}
"""Options of a name; the equations know ``discopop_tau`` as tau."""

BETA = 0.6


def options(name: str) -> dict:
    return {"loss_type": name, "beta": BETA, **HYPER.get(name, {})}


def equation_options(name: str) -> dict:
    return {"beta": BETA, **{key.removeprefix("discopop_"): value for key, value in HYPER.get(name, {}).items()}}


def stats(tokens, ld_alpha=None) -> dict:
    return sequence_stats(tokens, LAYOUT, ld_alpha=ld_alpha, with_weights=True, keep_tokens=True)


def completions(branch: str, ld_alpha: float | None) -> list[Completion]:
    """The completions of a branch, from the tokens, by the plain equations."""
    policy, reference = split_tokens(POLICY.logps, LAYOUT), split_tokens(REFERENCE.logps, LAYOUT)
    result = []
    for pair, (p, r) in enumerate(zip(policy[branch], reference[branch], strict=True)):
        public = min(LENGTHS["chosen"][pair], LENGTHS["rejected"][pair])
        alpha = 1.0 if ld_alpha is None else ld_alpha
        sums = [equations.ld_logp(tokens, public, alpha) for tokens in (p, r)]
        result.append(Completion(sums[0], sums[1], len(p)))
    return result


def weights(branch: str) -> list[float]:
    assert POLICY.log_sum_sq_prob is not None
    probs = split_tokens(POLICY.logps.exp(), LAYOUT)[branch]
    squares = split_tokens(POLICY.log_sum_sq_prob.exp(), LAYOUT)[branch]
    return [equations.wpo_weight(p, s) for p, s in zip(probs, squares, strict=True)]


def pair_values(objective, policy=None, reference=None) -> torch.Tensor:
    """The values of the first term."""
    terms = objective(policy or stats(POLICY, objective.ld_alpha), reference or stats(REFERENCE, objective.ld_alpha))
    assert terms.terms[0].unit == "pair"
    return terms.terms[0].values


def assert_equal(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


SORTED = ("aot", "aot_unpaired")
OF_A_PAIR = [name for name in LOSSES["dpo"] if name not in SORTED]
REFERENCE_FREE = [(method, name) for method in ("cpo", "tpo") for name in LOSSES[method]]
SCORES = {
    "reverse_kl": equations.score_reverse_kl,
    "forward_kl": equations.score_forward_kl,
    "js_divergence": equations.score_js_divergence,
    "alpha_divergence": lambda u: equations.score_alpha_divergence(u, 0.3),
}
WITH_DIVERGENCE = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]


class TestValues:
    """Every name, alone and with LD-DPO and WPO, from token log-probs to the loss of each pair."""

    @pytest.mark.parametrize("ld_alpha", [None, 0.3])
    @pytest.mark.parametrize("use_weighting", [False, True])
    @pytest.mark.parametrize("name", OF_A_PAIR)
    def test_dpo(self, name, use_weighting, ld_alpha):
        objective = build_objective("dpo", **options(name), use_weighting=use_weighting, ld_alpha=ld_alpha)
        expected = [
            equations.dpo_pair(name, w, lo, lambda d: d, equation_options(name))
            for w, lo in zip(completions("chosen", ld_alpha), completions("rejected", ld_alpha), strict=True)
        ]
        if use_weighting:
            both = zip(expected, weights("chosen"), weights("rejected"), strict=True)
            expected = [value * w * lo for value, w, lo in both]
        assert_equal(pair_values(objective), expected)

    @pytest.mark.parametrize("divergence", SCORES)
    @pytest.mark.parametrize("name", WITH_DIVERGENCE)
    def test_f_divergence(self, name, divergence):
        objective = build_objective(
            "dpo", **options(name), f_divergence_type=divergence, f_alpha_divergence_coef=0.3, ld_alpha=0.3
        )
        expected = [
            equations.dpo_pair(name, w, lo, lambda d: SCORES[divergence](math.exp(d)), equation_options(name))
            for w, lo in zip(completions("chosen", 0.3), completions("rejected", 0.3), strict=True)
        ]
        assert_equal(pair_values(objective), expected)

    @pytest.mark.parametrize("ld_alpha", [None, 0.3])
    @pytest.mark.parametrize("use_weighting", [False, True])
    @pytest.mark.parametrize("name", SORTED)
    def test_sorted(self, name, use_weighting, ld_alpha):
        """Each quantile with the weight of the pair, or of the two completions, that it was made from."""
        objective = build_objective("dpo", **options(name), use_weighting=use_weighting, ld_alpha=ld_alpha)
        pairs = list(zip(completions("chosen", ld_alpha), completions("rejected", ld_alpha), strict=True))
        w_chosen, w_rejected = weights("chosen"), weights("rejected")
        if name == "aot":
            first = [w.logp - lo.logp for w, lo in pairs]
            second = [w.ref - lo.ref for w, lo in pairs]
            carried = [c * r for _, c, r in sorted(zip(first, w_chosen, w_rejected, strict=True))]
        else:
            first, second = [w.log_ratio for w, _ in pairs], [lo.log_ratio for _, lo in pairs]
            chosen = [weight for _, weight in sorted(zip(first, w_chosen, strict=True))]
            rejected = [weight for _, weight in sorted(zip(second, w_rejected, strict=True))]
            carried = [c * r for c, r in zip(chosen, rejected, strict=True)]
        assert first != sorted(first)
        expected = getattr(equations, name)(first, second, **equation_options(name))
        if use_weighting:
            expected = [value * weight for value, weight in zip(expected, carried, strict=True)]
        assert_equal(pair_values(objective), expected)

    @pytest.mark.parametrize("ld_alpha", [None, 0.3])
    @pytest.mark.parametrize("use_weighting", [False, True])
    @pytest.mark.parametrize("alpha", [0.0, 0.25])
    @pytest.mark.parametrize(("method", "name"), REFERENCE_FREE)
    def test_reference_free(self, method, name, alpha, use_weighting, ld_alpha):
        """TPO has no alpha: it is without effect there."""
        objective = build_objective(
            method, **options(name), alpha=alpha, use_weighting=use_weighting, ld_alpha=ld_alpha, nll_weight=1.0
        )
        expected = [
            equations.reference_free_pair(name, w, lo, alpha if method == "cpo" else 0.0, equation_options(name))
            for w, lo in zip(completions("chosen", ld_alpha), completions("rejected", ld_alpha), strict=True)
        ]
        if use_weighting:
            both = zip(expected, weights("chosen"), weights("rejected"), strict=True)
            expected = [value * w * lo for value, w, lo in both]
        assert_equal(pair_values(objective), expected)

    @pytest.mark.parametrize("name", LOSSES["dpo"])
    def test_wpo_weights_are_constants(self, name):
        """The gradient of the weighted loss is the weighted gradient of the loss."""
        plain = pair_values(build_objective("dpo", **options(name)))
        objective = build_objective("dpo", **options(name), use_weighting=True)
        assert objective.statistics == {"log_sum_sq_prob"}
        weighted = pair_values(objective)
        constants = (weighted / plain).detach().nan_to_num()
        (expected,) = torch.autograd.grad((plain * constants).sum(), POLICY.logps)
        (actual,) = torch.autograd.grad(weighted.sum(), POLICY.logps)
        assert actual.norm() > 0
        torch.testing.assert_close(actual, expected)

    def test_wpo_asks_for_nothing_where_no_pair_is_weighed(self):
        assert build_objective("dpo", loss_type="sft", beta=BETA, use_weighting=True).statistics == frozenset()

    def test_alphapo_on_long_completions_stays_finite(self):
        """A likelihood of e^-2000: its -alpha-th power is infinite, that of its mean per token is not."""
        objective = build_objective("cpo", loss_type="sigmoid", beta=0.1, alpha=0.5)
        side = SequenceStats(torch.tensor([-2000.0], requires_grad=True), torch.tensor([1000.0]))
        values = objective({"chosen": side, "rejected": side}).terms[0].values
        values.sum().backward()
        assert values.isfinite().all()
        assert side.sum_logps.grad is not None
        assert side.sum_logps.grad.isfinite().all()


class TestTerms:
    """Weighted sums and added terms."""

    def test_mpo(self):
        objective = build_objective(
            "dpo", loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.1
        )
        terms = objective(stats(POLICY), stats(REFERENCE)).terms
        assert [(t.name, t.weight, t.unit, t.branch) for t in terms] == [
            ("sigmoid", 0.8, "pair", None),
            ("bco_pair", 0.2, "pair", None),
            ("sft", 1.0, "token", "chosen"),
        ]
        assert objective.names == ("sigmoid", "bco_pair", "sft")
        assert objective.needs_tokens
        assert objective.nll_branch == "chosen"

    @pytest.mark.parametrize("use_weighting", [False, True])
    def test_sft_and_nll_are_plain_token_means(self, use_weighting):
        """Neither LD-DPO nor WPO touches them."""
        for method, name, branch in (("dpo", "sft", "chosen"), ("cpo", "nll", "chosen"), ("tpo", "nll", "gold")):
            objective = build_objective(
                method,
                loss_type=["sigmoid", "sft"] if method == "dpo" else "sigmoid",
                beta=0.1,
                nll_weight=0.0 if method == "dpo" else 0.5,
                ld_alpha=0.0,
                use_weighting=use_weighting,
            )
            term = objective(stats(POLICY, 0.0), stats(REFERENCE, 0.0)).terms[-1]
            assert (term.name, term.unit, term.branch) == (name, "token", branch)
            assert term.weight == (1.0 if method == "dpo" else 0.5)
            expected = [-logp for completion in split_tokens(POLICY.logps, LAYOUT)[branch] for logp in completion]
            assert_equal(term.values, expected)

    def test_every_method_takes_a_list(self):
        cpo = build_objective("cpo", loss_type=["simpo", "hinge"], loss_weights=[2, 0.5], beta=0.1, nll_weight=1.0)
        assert [(t.name, t.weight) for t in cpo(stats(POLICY)).terms] == [("simpo", 2), ("hinge", 0.5), ("nll", 1.0)]
        tpo = build_objective("tpo", loss_type=["tpo-l", "ipo"], beta=0.1, nll_weight=1.0)
        assert [(t.name, t.weight) for t in tpo(stats(POLICY)).terms] == [("tpo-l", 1), ("ipo", 1), ("nll", 1.0)]

    def test_alphapo_alone_has_no_nll_and_in_a_list_the_given_one(self):
        def terms(loss_type):
            objective = build_objective("cpo", loss_type=loss_type, beta=0.1, alpha=0.25, nll_weight=1.0)
            return [(t.name, t.weight) for t in objective(stats(POLICY)).terms]

        assert terms("alphapo") == terms(["alphapo"]) == [("alphapo", 1.0)]
        assert terms(["alphapo", "hinge"]) == [("alphapo", 1.0), ("hinge", 1.0), ("nll", 1.0)]

    def test_aot_pair_is_aot_unpaired(self):
        older = build_objective("dpo", loss_type="aot_pair", beta=BETA)
        assert older.names == ("aot_unpaired",)
        assert torch.equal(pair_values(older), pair_values(build_objective("dpo", loss_type="aot_unpaired", beta=BETA)))

    def test_missing_statistics_say_what_to_ask_for(self):
        bare = sequence_stats(POLICY, LAYOUT)
        with pytest.raises(ValueError, match="keep_tokens=True"):
            build_objective("cpo", loss_type="sigmoid", beta=0.1, nll_weight=1.0)(bare)
        with pytest.raises(ValueError, match="with_weights=True"):
            build_objective("cpo", loss_type="sigmoid", beta=0.1, use_weighting=True)(bare)
        with pytest.raises(ValueError, match="DPO compares with a reference"):
            build_objective("dpo", loss_type="sigmoid", beta=0.1)(bare)


class TestNeeds:
    """What an objective declares."""

    @pytest.mark.parametrize(
        ("method", "given", "expected"),
        [
            ("dpo", {}, (True, 2, None)),
            ("dpo", {"loss_type": "sft"}, (True, 2, "chosen")),
            ("cpo", {"nll_weight": 1.0}, (False, 2, "chosen")),
            ("cpo", {"nll_weight": 0.0}, (False, 2, "chosen")),
            ("tpo", {"nll_weight": 1.0}, (False, 3, "gold")),
            ("tpo", {"nll_weight": 0.0}, (False, 2, None)),
        ],
    )
    def test_reference_branches_and_nll(self, method, given, expected):
        objective = build_objective(method, **{"loss_type": "sigmoid", "beta": 0.1, **given})
        actual = objective.needs_reference, len(objective.branches), objective.nll_branch
        assert actual == expected
        assert objective.logs_nll == (expected[2] is not None)
        assert objective.needs_tokens == (given.get("loss_type") == "sft" or given.get("nll_weight") == 1.0)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"loss_type": ["sigmoid", "bco_pair"]}, ()),
            ({"loss_type": ["aot", "sigmoid", "aot_pair"]}, ("aot", "aot_unpaired")),
            ({"loss_type": ["sigmoid", "bco_pair"], "bco_shift": True}, ("bco_pair",)),
            ({"loss_type": "sigmoid", "bco_shift": True}, ()),
        ],
    )
    def test_functions_of_a_micro_batch(self, given, expected):
        assert build_objective("dpo", **given, beta=0.1).micro_batch_losses == expected

    def test_an_objective_can_be_copied_and_pickled(self):
        for method, name in [("dpo", "bco_pair"), ("cpo", "alphapo"), ("tpo", "tpo-l")]:
            objective = build_objective(method, loss_type=name, beta=0.1, alpha=0.25, bco_shift=method == "dpo")
            expected = pair_values(copy.deepcopy(objective))
            for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
                assert torch.equal(pair_values(other), expected)


class TestReport:
    """Rewards and log-probs of the log."""

    @pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "aot", "sft"])
    @pytest.mark.parametrize("ld_alpha", [None, 0.3])
    def test_dpo_rewards_are_beta_times_the_log_ratio_whatever_the_loss(self, name, ld_alpha):
        extra = {"f_divergence_type": "js_divergence"} if name in WITH_DIVERGENCE else {}
        objective = build_objective("dpo", **{**options(name), **extra}, ld_alpha=ld_alpha)
        terms = objective(stats(POLICY, ld_alpha), stats(REFERENCE, ld_alpha))
        for branch in ("chosen", "rejected"):
            assert_equal(terms.rewards[branch], [BETA * y.log_ratio for y in completions(branch, ld_alpha)])
            assert_equal(terms.logps[branch], [y.logp for y in completions(branch, ld_alpha)])
            assert not terms.rewards[branch].requires_grad
            assert not terms.logps[branch].requires_grad

    @pytest.mark.parametrize(("method", "name"), REFERENCE_FREE)
    @pytest.mark.parametrize("alpha", [0.0, 0.25])
    def test_reference_free_rewards_are_beta_times_r_of_the_first_loss(self, method, name, alpha):
        alpha = alpha if method == "cpo" else 0.0
        per_token = name in ("ipo", "simpo", "alphapo", "tpo-l") or alpha != 0
        objective = build_objective(method, **{**options(name), "loss_type": [name, "sigmoid"]}, alpha=alpha)
        terms = objective(stats(POLICY))
        for branch in ("chosen", "rejected"):
            logps = [y.mean_logp if per_token else y.logp for y in completions(branch, None)]
            assert_equal(terms.logps[branch], logps)
            shaped = [equations.alpha_reward(logp, alpha) if alpha else logp for logp in logps]
            assert_equal(terms.rewards[branch], [BETA * r for r in shaped])
            assert not terms.rewards[branch].requires_grad


class TestShift:
    """BCO's running reward shift."""

    def test_the_shift_takes_in_the_rewards_before_it_is_used(self):
        objective = build_objective("dpo", loss_type="bco_pair", beta=BETA, bco_shift=True)
        terms = objective(stats(POLICY), stats(REFERENCE))
        pairs = list(zip(completions("chosen", None), completions("rejected", None), strict=True))
        rewards = [BETA * y.log_ratio for pair in pairs for y in pair]
        shift = sum(rewards) / len(rewards)
        assert objective.reward_shift is not None
        assert objective.reward_shift.state_dict() == {"mean": pytest.approx(shift), "count": 8}
        expected = [equations.bco_pair(w.log_ratio, lo.log_ratio, beta=BETA, shift=shift) for w, lo in pairs]
        assert_equal(terms.terms[0].values, expected)

    def test_dummies_and_evaluation_do_not_move_it(self):
        objective = build_objective("dpo", loss_type=["bco_pair", "sigmoid"], beta=BETA, bco_shift=True)
        assert objective.reward_shift is not None
        objective(stats(POLICY), stats(REFERENCE), learn=False)
        with torch.no_grad():
            objective(stats(POLICY), stats(REFERENCE))
        assert objective.reward_shift.count == 0
        objective(stats(POLICY), stats(REFERENCE))
        assert objective.reward_shift.count == 8

    def test_it_is_off_unless_asked_for(self):
        assert build_objective("dpo", loss_type="bco_pair", beta=0.1).reward_shift is None
        assert build_objective("dpo", loss_type="sigmoid", beta=0.1, bco_shift=True).reward_shift is None
