"""Which options of an objective are refused, and how that is said; which have no effect, and are said to."""

from __future__ import annotations

import re

import pytest

from prefopt.objective import LOSSES, build_objective, objective_mistakes, objective_warnings

WITH_DIVERGENCE = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]

GIVEN = {"beta": 0.1, "label_smoothing": 0.1}
"""Options that are right for every loss."""

MISTAKES = {
    "unknown name": ("dpo", {"loss_type": "sigmod"}, ["'sigmod' is unknown", "mean 'sigmoid'"]),
    "nothing like it": ("dpo", {"loss_type": "xyz"}, ["'xyz' is unknown. Set one of 'sigmoid'"]),
    "no name": ("dpo", {"loss_type": []}, ["loss_type is empty"]),
    "None": ("dpo", {"loss_type": None}, ["loss_type is empty"]),
    "another trainer's": ("dpo", {"loss_type": "simpo"}, ["'simpo' is a loss of CPOTrainer, not of DPOTrainer"]),
    "sft in CPO": ("cpo", {"loss_type": ["sigmoid", "sft"]}, ["'sft' is a loss of DPOTrainer"]),
    "kto": ("cpo", {"loss_type": "kto_pair"}, ["'kto_pair' is refused", "needs a reference"]),
    "number of weights": ("dpo", {"loss_weights": [1, 2]}, ["loss_weights=[1, 2] has 2 values for 1 losses"]),
    "weight": ("dpo", {"loss_weights": [float("inf")]}, ["loss_weights=[inf] must be finite"]),
    "weight that is a word": ("dpo", {"loss_weights": ["a"]}, ["loss_weights=['a'] must be finite"]),
    "weights that are none": ("dpo", {"loss_weights": 0.5}, ["loss_weights=0.5 must be a list"]),
    "beta 0": ("dpo", {"beta": 0.0}, ["beta=0.0 must be a number above 0: set for example 0.1"]),
    "beta below": ("cpo", {"beta": -0.1}, ["beta=-0.1"]),
    "beta nan": ("tpo", {"beta": float("nan")}, ["beta=nan"]),
    "beta bool": ("tpo", {"beta": True}, ["beta=True"]),
    "tau": ("dpo", {"discopop_tau": 0}, ["discopop_tau=0 must be a number above 0: set for example 0.05"]),
    "ld above": ("dpo", {"ld_alpha": 7.0}, ["ld_alpha=7.0 must lie in [0, 1]"]),
    "ld below": ("tpo", {"ld_alpha": -0.1}, ["ld_alpha=-0.1"]),
    "smoothing above": ("dpo", {"label_smoothing": 0.6}, ["label_smoothing=0.6 must lie in [0, 0.5]"]),
    "smoothing below": ("cpo", {"label_smoothing": -0.1}, ["label_smoothing=-0.1 must lie in [0, 0.5]"]),
    "smoothing nan": ("cpo", {"label_smoothing": float("nan")}, ["label_smoothing=nan"]),
    "robust": ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, ["must lie in [0, 0.5) with", "'robust'"]),
    "exo 0": ("dpo", {"loss_type": "exo_pair"}, ["must lie in (0, 0.5) with", "'exo_pair'"]),
    "exo 1/2": (
        "dpo",
        {"loss_type": ["exo_pair"], "label_smoothing": 0.5},
        ["label_smoothing=0.5 must lie in (0, 0.5)"],
    ),
    "gamma": ("cpo", {"gamma": float("inf")}, ["simpo_gamma=inf must be a finite number"]),
    "tpo gamma": ("tpo", {"gamma": float("inf")}, ["tpo_l_gamma=inf"]),
    "cpo_alpha": ("cpo", {"nll_weight": float("nan")}, ["cpo_alpha=nan"]),
    "tpo_alpha": ("tpo", {"nll_weight": "1"}, ["tpo_alpha='1'"]),
    "alpha": ("cpo", {"alpha": float("nan")}, ["alpha=nan must be a finite number"]),
    "coefficient": ("dpo", {"f_alpha_divergence_coef": float("nan")}, ["f_alpha_divergence_coef=nan"]),
    "divergence": ("dpo", {"f_divergence_type": "kl"}, ["f_divergence_type='kl' is unknown", "'forward_kl'"]),
    "one completion": ("dpo", {"num_completions": 1}, ["num_completions=1 must be a whole number from 2 to 8"]),
    "nine completions": ("cpo", {"num_completions": 9}, ["num_completions=9 must be a whole number from 2 to 8"]),
    "half a completion": ("tpo", {"num_completions": 2.5}, ["num_completions=2.5 must be a whole number"]),
    "ranking": ("dpo", {"ranking": "listwise"}, ["ranking='listwise' is unknown: set one of 'all_pairs'"]),
    "sorted ranking": ("dpo", {"num_completions": 3, "loss_type": "aot"}, ["num_completions=3", "'aot', which sorts"]),
    "shifted ranking": (
        "dpo",
        {"num_completions": 3, "loss_type": "bco_pair", "bco_shift": True},
        ["num_completions=3 does not go with bco_shift=True"],
    ),
    "ranking with LD-DPO": (
        "cpo",
        {"num_completions": 3, "ld_alpha": 0.5},
        ["num_completions=3 does not go with ld_alpha=0.5", "another log-prob in each of its pairs"],
    ),
    "order of a hinge": (
        "cpo",
        {"num_completions": 3, "ranking": "plackett_luce", "loss_type": "hinge"},
        ["ranking='plackett_luce' is the likelihood of an order, which loss_type 'hinge' is not", "'simpo'"],
    ),
    "order with smoothing": (
        "dpo",
        {"num_completions": 3, "ranking": "plackett_luce", "label_smoothing": 0.1},
        ["ranking='plackett_luce'", "set label_smoothing=0"],
    ),
    "order with WPO": (
        "dpo",
        {"num_completions": 3, "ranking": "plackett_luce", "use_weighting": True},
        ["ranking='plackett_luce'", "set use_weighting=False"],
    ),
    "divergence in CPO": ("cpo", {"f_divergence_type": "forward_kl"}, ["CPO has none", "use DPOTrainer"]),
}


class TestRefusals:
    """What is refused, and how it is said."""

    @pytest.mark.parametrize("case", MISTAKES)
    def test_one_mistake(self, case):
        method, given, parts = MISTAKES[case]
        given = {"loss_type": "sigmoid", "beta": 0.1, **given}
        mistakes = objective_mistakes(method, **given)
        assert len(mistakes) == 1, mistakes
        assert all(part in mistakes[0] for part in parts), mistakes
        assert re.search(r"\b[sS]et\b", mistakes[0]), "says what to set instead"
        with pytest.raises(ValueError, match="1 mistake"):
            build_objective(method, **given)

    @pytest.mark.parametrize("name", [name for name in LOSSES["dpo"] if name not in WITH_DIVERGENCE])
    @pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
    def test_divergence_where_the_partition_function_stays(self, name, divergence):
        given = {**GIVEN, "loss_type": ["sigmoid", name], "f_divergence_type": divergence}
        (mistake,) = objective_mistakes("dpo", **given)
        assert repr(name) in mistake.split("only in")[0]
        assert "'sigmoid'" not in mistake.split("only in")[0]
        assert "log Z(x)" in mistake

    @pytest.mark.parametrize("name", [*WITH_DIVERGENCE, "sft"])
    def test_divergence_where_it_cancels(self, name):
        given = {**GIVEN, "loss_type": ["sigmoid", name], "f_divergence_type": "js_divergence"}
        assert objective_mistakes("dpo", **given) == []

    def test_all_mistakes_come_at_once(self):
        given = {
            "loss_type": ["sigmod", "bco_pair"],
            "loss_weights": [1.0],
            "beta": 0,
            "label_smoothing": 2,
            "ld_alpha": 2,
            "discopop_tau": -1,
            "f_divergence_type": "js_divergence",
        }
        mistakes = objective_mistakes("dpo", **given)
        assert len(mistakes) == 7
        with pytest.raises(ValueError, match="7 mistake") as error:
            build_objective("dpo", **given)
        assert all(mistake in str(error.value) for mistake in mistakes)

    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match="method='kto' is not a method"):
            build_objective("kto", loss_type="sigmoid", beta=0.1)

    @pytest.mark.parametrize("eps", [0.0, 0.5])
    def test_the_ends_of_the_ranges_are_in(self, eps):
        assert objective_mistakes("dpo", loss_type="sigmoid", beta=0.1, label_smoothing=eps) == []
        assert objective_mistakes("dpo", loss_type="sigmoid", beta=0.1, ld_alpha=2 * eps) == []
        assert objective_mistakes("dpo", loss_type="robust", beta=0.1, label_smoothing=0.499) == []
        assert objective_mistakes("dpo", loss_type="exo_pair", beta=0.1, label_smoothing=1e-3) == []


WARNINGS = {
    "smoothing": ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
    "tau": ("dpo", {"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
    "gamma": ("cpo", {"gamma": 1.0}, "simpo_gamma=1.0 has no effect"),
    "tpo gamma": ("tpo", {"gamma": 1.0}, "tpo_l_gamma=1.0 has no effect"),
    "coefficient": ("dpo", {"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3 has no effect"),
    "divergence": ("dpo", {"loss_type": "sft", "f_divergence_type": "js_divergence"}, "f_divergence_type='js_div"),
    "weighting": ("dpo", {"loss_type": "sft", "use_weighting": True}, "use_weighting=True has no effect"),
    "ld": ("dpo", {"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect"),
    "shift": ("dpo", {"bco_shift": True}, "bco_shift=True has no effect"),
    "alpha in TPO": ("tpo", {"alpha": 0.5}, "alpha=0.5 has no effect"),
    "nll in DPO": ("dpo", {"nll_weight": 0.5}, "nll_weight=0.5 has no effect"),
    "aot_pair": ("dpo", {"loss_type": "aot_pair"}, "'aot_pair' is an older name of 'aot_unpaired'"),
    "ranking of pairs": ("dpo", {"ranking": "plackett_luce"}, "ranking='plackett_luce' has no effect"),
    "alphapo without alpha": ("cpo", {"loss_type": "alphapo"}, "'alphapo' with alpha=0 is SimPO"),
    "alphapo with NLL": (
        "cpo",
        {"loss_type": "alphapo", "alpha": 0.1, "nll_weight": 0.5},
        "cpo_alpha=0.5 has no effect",
    ),
}

SILENT = {
    "defaults of DPO": ("dpo", {}),
    "defaults of CPO": ("cpo", {"gamma": 0.5, "nll_weight": 1.0}),
    "defaults of TPO": ("tpo", {"gamma": 0.5, "nll_weight": 1.0}),
    "smoothing used": ("dpo", {"loss_type": ["hinge", "sigmoid_norm"], "label_smoothing": 0.1}),
    "smoothing used by SimPO": ("cpo", {"loss_type": "simpo", "label_smoothing": 0.1, "gamma": 1.0}),
    "divergence used": ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "tau used": ("dpo", {"loss_type": ["sft", "discopop"], "discopop_tau": 0.1}),
    "weights used": ("dpo", {"loss_type": ["sft", "hinge"], "use_weighting": True, "ld_alpha": 0.5}),
    "ranking used": ("dpo", {"ranking": "plackett_luce", "num_completions": 8}),
    "shift used": ("dpo", {"loss_type": "bco_pair", "bco_shift": True}),
    "alphapo": ("cpo", {"loss_type": "alphapo", "alpha": 0.25, "gamma": 0.1, "nll_weight": 1.0}),
    "alphapo in a list": ("cpo", {"loss_type": ["alphapo", "hinge"], "alpha": 0.25, "nll_weight": 0.3}),
}


class TestWarnings:
    """Options without effect are said, others are not."""

    @pytest.mark.parametrize("case", WARNINGS)
    def test_a_warning(self, case):
        method, given, part = WARNINGS[case]
        given = {"loss_type": "sigmoid", "beta": 0.1, **given}
        assert objective_mistakes(method, **given) == []
        (warning,) = objective_warnings(method, **given)
        assert part in warning

    def test_a_warning_names_the_losses_that_use_the_option(self):
        (warning,) = objective_warnings("dpo", loss_type="hinge", beta=0.1, label_smoothing=0.1)
        users = warning.split("it is used by ")[1]
        assert users == "'sigmoid', 'exo_pair', 'robust', 'aot', 'aot_unpaired', 'sigmoid_norm'."

    @pytest.mark.parametrize("case", SILENT)
    def test_none(self, case):
        method, given = SILENT[case]
        given = {"loss_type": "sigmoid", "beta": 0.1, **given}
        assert objective_mistakes(method, **given) == objective_warnings(method, **given) == []
