"""Every loss as a pure function of tensors: unreduced, hyper-parameters by keyword, its equation in the docstring.

A method is a score of a completion, a pairwise function of the scores, and an added term. The functions of the pair
are here, by what they take:

- `pairwise`: the margin of the scores (sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop);
- `pointwise`: both log-ratios (nca_pair, bco_pair, sppo_hard, apo_zero, apo_down);
- `transport`: the same, sorted within the micro-batch (aot, aot_unpaired);
- `reference_free`: the margin of mean log-probs (simpo, tpo_l);
- `rankings`: the pairs of more than two completions (mean_over_pairs, plackett_luce);
- `nll`: the tokens of one completion (sft, and the term of CPO and TPO).

`divergences` and `transforms` change what goes in; `running` keeps BCO's shift. Which name of a config means which
function, and what else it needs, is said by `prefopt.objective`.
"""

from prefopt.losses.divergences import alpha_divergence, forward_kl, js_divergence, reverse_kl
from prefopt.losses.logistic import smoothed_logistic
from prefopt.losses.nll import nll
from prefopt.losses.pairwise import discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm
from prefopt.losses.pointwise import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from prefopt.losses.rankings import mean_over_pairs, plackett_luce
from prefopt.losses.reference_free import simpo, tpo_l
from prefopt.losses.running import RewardShift
from prefopt.losses.transforms import alpha_shape, ld_token_weights, wpo_token_log_weights
from prefopt.losses.transport import aot, aot_unpaired, ascending

__all__ = [
    "RewardShift",
    "alpha_divergence",
    "alpha_shape",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "ascending",
    "bco_pair",
    "discopop",
    "exo_pair",
    "forward_kl",
    "hinge",
    "ipo",
    "js_divergence",
    "ld_token_weights",
    "mean_over_pairs",
    "nca_pair",
    "nll",
    "plackett_luce",
    "reverse_kl",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "smoothed_logistic",
    "sppo_hard",
    "tpo_l",
    "wpo_token_log_weights",
]
