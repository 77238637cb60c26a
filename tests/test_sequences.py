"""Token statistics to one number per completion, with the weights of LD-DPO and WPO."""

from __future__ import annotations

import pytest
import torch
from losses import equations
from pairs import LENGTHS, make_layout, random_tokens, split_tokens

from prefopt.scoring.sequences import sequence_stats
from prefopt.types import TokenStats


def as_tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def layout():
    return make_layout(LENGTHS)


def test_a_worked_example():
    """Two pairs, chosen of 2 and 1 tokens, rejected of 1 and 3: m = 1 and 1; with alpha 1/2 the rest counts half."""
    layout = make_layout({"chosen": [2, 1], "rejected": [1, 3]})
    tokens = TokenStats(logps=torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -2.0, -5.0]))
    plain = sequence_stats(tokens, layout)
    assert plain["chosen"].sum_logps.tolist() == [-3, -4]
    assert plain["rejected"].sum_logps.tolist() == [-3, -8]
    assert plain["rejected"].num_tokens.tolist() == [1, 3]
    assert plain["chosen"].mean_logps.tolist() == [-1.5, -4]
    weighted = sequence_stats(tokens, layout, ld_alpha=0.5)
    assert weighted["chosen"].sum_logps.tolist() == [-2, -4]
    assert weighted["rejected"].sum_logps.tolist() == [-3, -4.5]


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
def test_sums_are_those_of_a_loop(layout, ld_alpha):
    tokens = random_tokens(layout, 0)
    logps = split_tokens(tokens.logps, layout)
    stats = sequence_stats(tokens, layout, ld_alpha=ld_alpha)
    assert set(stats) == {"chosen", "rejected", "gold"}
    for branch, completions in logps.items():
        expected = [
            equations.ld_logp(
                completion,
                len(completion) if branch == "gold" else min(len(logps["chosen"][pair]), len(logps["rejected"][pair])),
                1.0 if ld_alpha is None else ld_alpha,
            )
            for pair, completion in enumerate(completions)
        ]
        torch.testing.assert_close(stats[branch].sum_logps, as_tensor(expected))
        assert stats[branch].num_tokens.tolist() == [len(completion) for completion in completions]


def test_the_excess_length_has_its_share_of_the_gradient(layout):
    tokens = random_tokens(layout, 0)
    stats = sequence_stats(tokens, layout, ld_alpha=0.25)
    (gradient,) = torch.autograd.grad(sum(branch.sum_logps.sum() for branch in stats.values()), tokens.logps)
    assert split_tokens(gradient, layout) == {
        "chosen": [[1, 1, 0.25], [1], [1, 1, 1, 1, 1], [1, 0.25]],
        "rejected": [[1, 1], [1, 0.25, 0.25, 0.25], [1, 1, 1, 1, 1], [1]],
        "gold": [[1] * 6, [1] * 2, [1], [1] * 3],
    }


def test_kept_tokens_have_no_weights(layout):
    tokens = random_tokens(layout, 1)
    stats = sequence_stats(tokens, layout, ld_alpha=0.0, keep_tokens=True)
    for branch, completions in split_tokens(tokens.logps, layout).items():
        kept = stats[branch].token_logps
        assert kept is not None
        assert kept.tolist() == [logp for completion in completions for logp in completion]
    assert all(branch.token_logps is None for branch in sequence_stats(tokens, layout).values())


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_wpo_weights_are_geometric_means(layout, ld_alpha):
    """LD-DPO leaves them alone."""
    tokens = random_tokens(layout, 2)
    stats = sequence_stats(tokens, layout, ld_alpha=ld_alpha, with_weights=True)
    probs, squares = split_tokens(tokens.logps.exp(), layout), split_tokens(tokens.log_sum_sq_prob.exp(), layout)
    for branch in layout.branches:
        expected = [equations.wpo_weight(p, s) for p, s in zip(probs[branch], squares[branch], strict=True)]
        log_weight = stats[branch].log_weight
        assert log_weight is not None
        assert not log_weight.requires_grad
        torch.testing.assert_close(log_weight.exp(), as_tensor(expected))
    assert all(branch.log_weight is None for branch in sequence_stats(tokens, layout).values())


def test_wpo_without_its_statistic_says_what_to_ask_for(layout):
    tokens = TokenStats(logps=random_tokens(layout, 2).logps)
    with pytest.raises(ValueError, match="log_sum_sq_prob"):
        sequence_stats(tokens, layout, with_weights=True)


def test_a_completion_without_tokens_is_zero_and_not_nan():
    layout = make_layout({"chosen": [2, 0], "rejected": [0, 1]})
    tokens = random_tokens(layout, 3)
    stats = sequence_stats(tokens, layout, ld_alpha=0.5, with_weights=True, keep_tokens=True)
    assert stats["chosen"].sum_logps[1] == stats["rejected"].sum_logps[0] == 0
    assert stats["chosen"].mean_logps[1] == 0
    assert stats["chosen"].log_weight is not None
    assert stats["chosen"].log_weight[1] == 0


def test_half_precision_tokens_are_summed_in_float32():
    """256 tokens of -1 and 256 of -2^-8: bfloat16 would lose the small ones."""
    layout = make_layout({"chosen": [512], "rejected": [1]})
    logps = torch.cat([torch.full((256,), -1.0), torch.full((256,), -(2.0**-8)), torch.tensor([-1.0])])
    stats = sequence_stats(TokenStats(logps=logps.bfloat16()), layout)
    assert stats["chosen"].sum_logps.dtype == torch.float32
    assert stats["chosen"].sum_logps.item() == -257
