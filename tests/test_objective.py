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

from prefopt.objective import LOSSES, build_objective, losses_with_column, refused_columns
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import PAIR, RANKS, SequenceStats

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
            ({"loss_type": ["sigmoid", "bco_pair"]}, ((), ())),
            ({"loss_type": ["aot", "sigmoid", "aot_pair"]}, (("aot", "aot_unpaired"), ())),
            ({"loss_type": ["sigmoid", "bco_pair"], "bco_shift": True}, ((), ("bco_pair",))),
            ({"loss_type": "sigmoid", "bco_shift": True}, ((), ())),
        ],
    )
    def test_functions_of_many_pairs_at_once(self, given, expected):
        objective = build_objective("dpo", **given, beta=0.1)
        assert (objective.sorted_losses, objective.shifted_losses) == expected
        assert objective.needs_whole_step == (expected != ((), ()))

    def test_an_objective_can_be_copied_and_pickled(self):
        for method, name in [("dpo", "bco_pair"), ("cpo", "alphapo"), ("tpo", "tpo-l")]:
            objective = build_objective(method, loss_type=name, beta=0.1, alpha=0.25, bco_shift=method == "dpo")
            expected = pair_values(copy.deepcopy(objective))
            for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
                assert torch.equal(pair_values(other), expected)


GAMMAS = [0.7, 0.0, -0.4, 1.3]
"""A target margin for each of the four pairs."""

WITH_MARGIN = {
    "sigmoid": lambda u, g, b: equations.logistic(b * u - g, 0.1),
    "sigmoid_norm": lambda u, g, b: equations.logistic(b * u - g, 0.1),
    "simpo": lambda u, g, b: equations.logistic(b * u - 0.4 - g, 0.1),
    "alphapo": lambda u, g, b: equations.logistic(b * u - 0.4 - g, 0.1),
    "tpo-l": lambda u, g, b: equations.logistic(b * u - 0.4 - g, 0.1),
    "hinge": lambda u, g, b: max(0.0, 1 + g - b * u),
    "ipo": lambda u, g, b: (u - (1 / 2 + g) / b) ** 2,
    "exo_pair": lambda u, g, b: equations.exo_pair(b * u - g, beta=1.0, label_smoothing=0.1),
    "robust": lambda u, g, b: equations.robust(b * u - g, beta=1.0, label_smoothing=0.1),
    "discopop": lambda u, g, b: equations.discopop(b * u - g, beta=1.0, tau=0.3),
}
"""Loss of a difference u of scores with target margin g and beta b."""

WITH_DIFFERENCE = [(method, name) for method in LOSSES for name in LOSSES[method] if name in WITH_MARGIN]
WITHOUT = {
    "nca_pair": "has a term of one completion alone",
    "bco_pair": "has a term of one completion alone",
    "sppo_hard": "has a term of one completion alone",
    "apo_zero": "has a term of one completion alone",
    "apo_down": "has a term of one completion alone",
    "aot": "compares quantiles",
    "aot_unpaired": "compares quantiles",
    "sft": "is the likelihood of one completion",
}


def with_margins(objective, gammas=GAMMAS):
    """All terms, with a target margin for each pair."""
    margins = torch.tensor(gammas, dtype=torch.float64)
    return objective(stats(POLICY, objective.ld_alpha), stats(REFERENCE, objective.ld_alpha), target_margins=margins)


class TestMargins:
    """A target margin of each row."""

    def test_dpo_with_an_offset_by_hand(self):
        """-log sigmoid(0.5 * 2 - 0.3) = log(1 + e^-0.7) = 0.40319; without the offset log(1 + e^-1) = 0.31326."""
        objective = build_objective("dpo", loss_type="sigmoid", beta=0.5)

        def side(value):
            return SequenceStats(torch.tensor([value, value], dtype=torch.float64), torch.ones(2))

        policy, reference = ({"chosen": side(w), "rejected": side(lo)} for w, lo in ((-1.0, -4.0), (-2.0, -3.0)))
        margins = torch.tensor([0.3, 0.0], dtype=torch.float64)
        assert_equal(objective(policy, reference, target_margins=margins).terms[0].values, [0.403186049, 0.313261688])

    @pytest.mark.parametrize("ld_alpha", [None, 0.3])
    @pytest.mark.parametrize(("method", "name"), WITH_DIFFERENCE)
    def test_every_loss_of_a_difference(self, method, name, ld_alpha):
        """It is subtracted from beta times the difference, and not multiplied by beta."""
        objective = build_objective(method, **options(name), ld_alpha=ld_alpha)
        expected = []
        pairs = zip(completions("chosen", ld_alpha), completions("rejected", ld_alpha), strict=True)
        for (w, lo), gamma in zip(pairs, GAMMAS, strict=True):
            per_token = name in ("ipo", "sigmoid_norm", "simpo", "alphapo", "tpo-l")
            scores = [y.log_ratio if method == "dpo" else y.logp for y in (w, lo)]
            lengths = [y.length if per_token else 1 for y in (w, lo)]
            u = scores[0] / lengths[0] - scores[1] / lengths[1]
            expected.append(WITH_MARGIN[name](u, gamma, BETA))
        assert_equal(with_margins(objective).terms[0].values, expected)

    @pytest.mark.parametrize(("method", "name"), WITH_DIFFERENCE)
    def test_no_margin_is_a_margin_of_zero(self, method, name):
        objective = build_objective(method, **options(name))
        assert torch.equal(with_margins(objective, [0.0] * 4).terms[0].values, pair_values(objective))

    @pytest.mark.parametrize(("method", "name"), [("cpo", "simpo"), ("cpo", "alphapo"), ("tpo", "tpo-l")])
    def test_one_margin_for_all_rows_is_gamma(self, method, name):
        both = build_objective(method, **{**options(name), "gamma": 0.25})
        together = build_objective(method, **{**options(name), "gamma": 0.75})
        torch.testing.assert_close(with_margins(both, [0.5] * 4).terms[0].values, pair_values(together))

    @pytest.mark.parametrize(("method", "name"), WITH_DIFFERENCE)
    def test_gradients(self, method, name):
        """Of the loss with respect to both completions' log-probs and the margins, by finite differences."""
        objective = build_objective(method, **options(name))
        lengths = torch.tensor([3.0, 1.0, 5.0, 2.0], dtype=torch.float64)
        reference = {branch: SequenceStats(stats(REFERENCE)[branch].sum_logps.detach(), lengths) for branch in PAIR}

        def loss(chosen, rejected, margins):
            policy = {"chosen": SequenceStats(chosen, lengths), "rejected": SequenceStats(rejected, lengths)}
            return objective(policy, reference, target_margins=margins).terms[0].values

        given = [stats(POLICY)[branch].sum_logps.detach().clone() for branch in PAIR]
        leaves = [value.requires_grad_() for value in (*given, torch.tensor(GAMMAS, dtype=torch.float64))]
        assert torch.autograd.gradcheck(loss, leaves)

    @pytest.mark.parametrize("divergence", SCORES)
    def test_with_wpo_and_a_divergence(self, divergence):
        """The divergence makes the scores, the margin shifts their difference, the weight multiplies the loss."""
        objective = build_objective(
            "dpo",
            **options("sigmoid"),
            f_divergence_type=divergence,
            f_alpha_divergence_coef=0.3,
            use_weighting=True,
        )
        pairs = zip(completions("chosen", None), completions("rejected", None), strict=True)
        scored = [[SCORES[divergence](math.exp(y.log_ratio)) for y in pair] for pair in pairs]
        values = [WITH_MARGIN["sigmoid"](w - lo, gamma, BETA) for (w, lo), gamma in zip(scored, GAMMAS, strict=True)]
        both = zip(values, weights("chosen"), weights("rejected"), strict=True)
        assert_equal(with_margins(objective).terms[0].values, [value * w * lo for value, w, lo in both])

    def test_in_a_list_it_acts_where_there_is_a_difference_and_rewards_are_without_it(self):
        objective = build_objective("dpo", loss_type=["sigmoid", "bco_pair", "sft"], beta=BETA)
        plain, shifted = objective(stats(POLICY), stats(REFERENCE)), with_margins(objective)
        changed = [not torch.equal(a.values, b.values) for a, b in zip(plain.terms, shifted.terms, strict=True)]
        assert changed == [True, False, False]
        assert losses_with_column(objective, "margin") == ["sigmoid"]
        assert losses_with_column(objective, "weight") == ["sigmoid", "bco_pair", "sft"]
        for branch in PAIR:
            assert torch.equal(plain.rewards[branch], shifted.rewards[branch])
            assert torch.equal(plain.logps[branch], shifted.logps[branch])


K = 4
RANK_LENGTHS = {"chosen": [3, 1, 5], "rejected": [2, 4, 5], "rank_3": [6, 0, 1], "rank_4": [1, 0, 0]}
"""Three rows, of 4, 2 and 3 completions."""
RANK_LAYOUT = make_layout(RANK_LENGTHS)  # type: ignore[arg-type]
RANK_POLICY, RANK_REFERENCE = random_tokens(RANK_LAYOUT, 20), random_tokens(RANK_LAYOUT, 21)


def rank_stats(tokens, *, of=None) -> dict:
    """Statistics of all ranks; of the row ``of`` alone, of its pair (j, k), with ``of=(row, j, k)``."""
    whole = sequence_stats(tokens, RANK_LAYOUT, with_weights=True, keep_tokens=True)
    if of is None:
        return whole
    row, better, worse = of
    sides = dict(zip(PAIR, (RANKS[better], RANKS[worse]), strict=True))
    own = ("sum_logps", "num_tokens", "log_weight")
    return {
        side: SequenceStats(**{name: getattr(whole[rank], name)[row : row + 1] for name in own})
        for side, rank in sides.items()
    }


def ranked(method, **given):
    """An objective of up to K completions, and the same of pairs."""
    return tuple(build_objective(method, num_completions=number, **given) for number in (K, 2))


class TestRankings:
    """More than two completions of a prompt."""

    @pytest.mark.parametrize("use_weighting", [False, True])
    @pytest.mark.parametrize(
        ("method", "name"), [(method, name) for method in LOSSES for name in LOSSES[method] if name not in SORTED]
    )
    def test_a_row_is_the_mean_of_its_pairs(self, method, name, use_weighting):
        whole, pair = ranked(method, **options(name), use_weighting=use_weighting)
        values = whole(rank_stats(RANK_POLICY), rank_stats(RANK_REFERENCE)).terms[0].values
        expected = []
        for row, count in enumerate([4, 2, 3]):
            pairs = [(row, j, k) for j in range(count) for k in range(j + 1, count)]
            of_pairs = [
                pair(rank_stats(RANK_POLICY, of=one), rank_stats(RANK_REFERENCE, of=one)).terms[0].values.item()
                for one in pairs
            ]
            expected.append(sum(of_pairs) / len(of_pairs))
        assert_equal(values, expected)

    @pytest.mark.parametrize(("method", "name"), [("dpo", "sigmoid"), ("cpo", "simpo"), ("tpo", "sigmoid")])
    def test_plackett_luce_is_the_likelihood_of_the_order(self, method, name):
        """e^s of the best over the sum of all, times that of the second over the sum of the rest, and so on."""
        gamma = 0.4 if name == "simpo" else 0.0
        objective, _ = ranked(method, loss_type=name, beta=BETA, gamma=gamma, ranking="plackett_luce")
        values = objective(rank_stats(RANK_POLICY), rank_stats(RANK_REFERENCE)).terms[0].values
        policy, reference = (split_tokens(tokens.logps, RANK_LAYOUT) for tokens in (RANK_POLICY, RANK_REFERENCE))
        expected = []
        for row, count in enumerate([4, 2, 3]):
            scores = []
            for rank in RANKS[:count]:
                score = sum(policy[rank][row]) - (sum(reference[rank][row]) if method == "dpo" else 0)
                scores.append(BETA * (score / len(policy[rank][row]) if name == "simpo" else score))
            likelihood = 1.0
            for place in range(count - 1):
                rest = sum(math.exp(score + gamma) for score in scores[place + 1 :])
                likelihood *= math.exp(scores[place]) / (math.exp(scores[place]) + rest)
            expected.append(-math.log(likelihood))
        assert_equal(values, expected)

    def test_three_by_hand(self):
        """s = 2, 1, 0: pairs log(1 + e^-1) twice and log(1 + e^-2), mean 0.251151; and Plackett-Luce
        log(1 + e^-1 + e^-2) + log(1 + e^-1) = 0.407606 + 0.313262."""
        sides = {
            rank: SequenceStats(torch.tensor([s]), torch.ones(1))
            for rank, s in zip(RANKS[:3], (2.0, 1.0, 0.0), strict=True)
        }
        for ranking, expected in (("all_pairs", 0.251151), ("plackett_luce", 0.720868)):
            objective = build_objective("cpo", loss_type="sigmoid", beta=1.0, num_completions=3, ranking=ranking)
            assert objective(sides).terms[0].values.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("ranking", ["all_pairs", "plackett_luce"])
    def test_two_are_the_pair_to_the_last_bit(self, ranking):
        whole, pair = ranked("dpo", loss_type=["sigmoid", "sft"], beta=BETA, ranking=ranking)
        policy, reference = stats(POLICY), stats(REFERENCE)
        absent = SequenceStats(torch.zeros(4), torch.zeros(4))
        more = dict.fromkeys(RANKS[2:K], absent)
        found = whole({**policy, **more}, {**reference, **more})
        expected = pair(policy, reference)
        for term, other in zip(found.terms, expected.terms, strict=True):
            assert torch.equal(term.values, other.values)
        for branch in PAIR:
            assert torch.equal(found.rewards[branch], expected.rewards[branch])
            assert torch.equal(found.logps[branch], expected.logps[branch])

    @pytest.mark.parametrize("ranking", ["all_pairs", "plackett_luce"])
    def test_gradients(self, ranking):
        """By finite differences; completions that are not there have none."""
        objective = build_objective("cpo", loss_type="sigmoid", beta=BETA, num_completions=K, ranking=ranking)
        given = rank_stats(RANK_POLICY)

        def loss(*sums):
            sides = {
                rank: SequenceStats(value, given[rank].num_tokens) for rank, value in zip(RANKS[:K], sums, strict=True)
            }
            return objective(sides).terms[0].values

        leaves = [given[rank].sum_logps.detach().clone().requires_grad_() for rank in RANKS[:K]]
        assert torch.autograd.gradcheck(loss, leaves)
        gradients = torch.autograd.grad(loss(*leaves).sum(), leaves)
        assert [g.ne(0).tolist() for g in gradients[2:]] == [[True, False, True], [True, False, False]]

    def test_the_report_is_of_the_best_and_the_mean_of_the_others(self):
        objective, _ = ranked("dpo", loss_type="sigmoid", beta=BETA)
        policy, reference = rank_stats(RANK_POLICY), rank_stats(RANK_REFERENCE)
        terms = objective(policy, reference)
        rewards = {rank: BETA * (policy[rank].sum_logps - reference[rank].sum_logps) for rank in RANKS[:K]}
        others = [
            sum(rewards[rank][row].item() for rank in RANKS[1:count]) / (count - 1)
            for row, count in enumerate([4, 2, 3])
        ]
        assert_equal(terms.rewards["rejected"], others)
        assert_equal(terms.rewards["chosen"], rewards["chosen"].tolist())
        assert not terms.rewards["rejected"].requires_grad

    def test_tpo_has_its_gold_completion_beside_the_ranks(self):
        objective = build_objective("tpo", loss_type="sigmoid", beta=BETA, num_completions=3, nll_weight=1.0)
        assert objective.branches == ("chosen", "rejected", "rank_3", "gold")
        assert objective.ranks == RANKS[:3]

    @pytest.mark.parametrize("column", ["margin", "ref_chosen_logps"])
    def test_numbers_of_a_pair_are_refused(self, column):
        pair, three = (build_objective("dpo", loss_type="sigmoid", beta=BETA, num_completions=n) for n in (2, 3))
        assert refused_columns(pair, [column]) == {}
        assert "set num_completions=2" in refused_columns(three, [column])[column]
        assert refused_columns(three, ["weight"]) == {}


class TestRefusedColumns:
    """Which losses cannot do with a margin or a weight, and why."""

    @pytest.mark.parametrize("name", [*LOSSES["dpo"], "sft"])
    def test_a_margin_needs_a_difference(self, name):
        objective = build_objective("dpo", **options(name))
        refused = refused_columns(objective, ["prompt", "margin"])
        assert bool(refused) == (name in WITHOUT)
        if refused:
            assert f"no loss takes a margin: {name!r} {WITHOUT[name]}" in refused["margin"]
            takers = refused["margin"].partition("add one of ")[2]
            assert {name for name in LOSSES["dpo"] if f"'{name}'" in takers} == set(LOSSES["dpo"]) - set(WITHOUT)

    @pytest.mark.parametrize("method", ["cpo", "tpo"])
    def test_reference_free_losses_take_margins_and_weights(self, method):
        for name in LOSSES[method]:
            objective = build_objective(method, **options(name), nll_weight=1.0)
            assert refused_columns(objective, ["margin", "weight"]) == {}
            assert losses_with_column(objective, "margin") == [name]

    @pytest.mark.parametrize("name", LOSSES["dpo"])
    def test_a_weight_needs_pairs_that_do_not_know_of_each_other(self, name):
        objective = build_objective("dpo", **{**options(name), "loss_type": ["sft", name]})
        refused = refused_columns(objective, ["weight"])
        assert bool(refused) == (name in SORTED)
        if refused:
            assert f"pairs cannot have weights: {name!r} matches the sorted values" in refused["weight"]

    def test_the_running_shift_takes_no_weights(self):
        objective = build_objective("dpo", loss_type="bco_pair", beta=BETA, bco_shift=True)
        assert "'bco_pair' shifts rewards by a running mean" in refused_columns(objective, ["weight"])["weight"]

    def test_columns_that_are_not_there_are_not_refused(self):
        assert refused_columns(build_objective("dpo", **options("aot")), ["prompt", "chosen"]) == {}


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
