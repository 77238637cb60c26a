"""One place for denominators: the same gradient for every split of a step into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pairs import make_batch, make_layout, random_tokens

from prefopt.normalise import local_counts, term_sum, total
from prefopt.objective import Objective, build_objective
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import TRIPLE, LossTerm, LossTerms, PreferenceBatch, StepCounts, TokenStats

PAIRS = [(3, 2, 6), (1, 4, 2), (5, 5, 1), (2, 1, 3), (7, 2, 2), (1, 1, 9), (4, 6, 1), (2, 3, 5)]
"""Lengths (chosen, rejected, gold) of eight pairs."""

OBJECTIVES = {
    "dpo": build_objective("dpo", loss_type="sigmoid", beta=0.3),
    "mpo": build_objective(
        "dpo",
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=0.3,
        use_weighting=True,
        ld_alpha=0.5,
    ),
    "cpo": build_objective("cpo", loss_type="sigmoid", beta=0.3, nll_weight=1.5),
    "tpo": build_objective("tpo", loss_type="tpo-l", beta=0.3, gamma=0.5, nll_weight=0.7),
}


def whole_step(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy log-probs (a leaf), log sums of squares and reference log-probs of all tokens, pair by pair."""
    lengths = {branch: [sum(pair) for pair in PAIRS] if branch == "chosen" else [0] * 8 for branch in TRIPLE}
    layout = make_layout(lengths)
    policy, reference = random_tokens(layout, 0, dtype), random_tokens(layout, 1, dtype)
    assert policy.log_sum_sq_prob is not None
    return policy.logps, policy.log_sum_sq_prob, reference.logps.detach()


def micro_batch(pairs: range) -> tuple[torch.Tensor, dict]:
    """Where the tokens of ``pairs`` stand among the whole step's, branch by branch; and their lengths."""
    starts = [sum(sum(pair) for pair in PAIRS[:p]) for p in range(len(PAIRS))]
    where = []
    for i in range(3):
        for p in pairs:
            first = starts[p] + sum(PAIRS[p][:i])
            where.extend(range(first, first + PAIRS[p][i]))
    return torch.tensor(where), {branch: [PAIRS[p][i] for p in pairs] for i, branch in enumerate(TRIPLE)}


def share(
    objective: Objective,
    pairs: range,
    counts: StepCounts,
    leaf: torch.Tensor,
    weight: float = 1.0,
    batch: PreferenceBatch | None = None,
) -> torch.Tensor:
    """The share of a micro-batch made of ``pairs``; ``batch`` where they have weights of their own."""
    _, squares, reference = whole_step(leaf.dtype)
    where, lengths = micro_batch(pairs)
    layout = make_layout(lengths)
    policy = sequence_stats(
        TokenStats(logps=leaf[where], log_sum_sq_prob=squares[where]),
        layout,
        ld_alpha=objective.ld_alpha,
        with_weights=True,
        keep_tokens=True,
    )
    ref = sequence_stats(TokenStats(logps=reference[where]), layout, ld_alpha=objective.ld_alpha)
    return total(objective(policy, ref), batch or make_batch(layout, weight), counts)


def added(counts: list[StepCounts]) -> StepCounts:
    """The sum over ranks, as the trainer's all-reduce gives it."""
    return StepCounts(
        num_pairs=sum(c.num_pairs for c in counts),
        num_tokens={b: sum(c.num_tokens.get(b, 0) for c in counts) for b in TRIPLE},
        num_micro_batches=sum(c.num_micro_batches for c in counts),
    )


def gradient(objective: Objective, ranks: list[list[tuple[range, float]]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the step split into ``ranks`` of micro-batches of pairs with a weight."""
    batches = [
        [make_batch(make_layout(micro_batch(pairs)[1]), weight) for pairs, weight in rank if len(pairs)]
        for rank in ranks
    ]
    counts = added([local_counts(rank) for rank in batches])
    leaf = whole_step()[0].detach().requires_grad_()
    losses = [share(objective, pairs, counts, leaf, weight) for rank in ranks for pairs, weight in rank]
    for loss in losses:
        loss.backward()
    assert leaf.grad is not None
    return sum(loss.item() for loss in losses), leaf.grad


SPLITS = {
    "4x2": [[(range(0, 2), 1.0), (range(2, 4), 1.0), (range(4, 6), 1.0), (range(6, 8), 1.0)]],
    "1x8": [[(range(p, p + 1), 1.0) for p in range(8)]],
    "uneven": [[(range(0, 5), 1.0), (range(5, 6), 1.0), (range(6, 8), 1.0)]],
    "two ranks": [[(range(0, 3), 1.0)], [(range(3, 4), 1.0), (range(4, 8), 1.0)]],
    "two ranks, one with a dummy": [[(range(0, 7), 1.0), (range(7, 8), 1.0)], [(range(0, 1), 0.0)]],
    "a rank of dummies alone": [[(range(0, 8), 1.0)], [(range(0, 2), 0.0)]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_split_gives_the_gradient_of_the_whole_step(name, split):
    loss, expected = gradient(OBJECTIVES[name], [[(range(0, 8), 1.0)]])
    split_loss, actual = gradient(OBJECTIVES[name], SPLITS[split])
    assert expected.norm() > 0
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_a_mean_per_micro_batch_would_not():
    """The comparison above can fail: token means of micro-batches, averaged, are another gradient."""
    where = [micro_batch(pairs) for pairs, _ in SPLITS["4x2"][0]]
    leaf = whole_step()[0].detach().requires_grad_()
    means = [-leaf[index[: sum(lengths["chosen"])]].mean() for index, lengths in where]
    (naive,) = torch.autograd.grad(sum(means) / len(means), leaf)
    objective = build_objective("dpo", loss_type="sft", beta=0.1)
    _, expected = gradient(objective, SPLITS["4x2"])
    assert (naive - expected).norm() > 0.1 * expected.norm()


def terms_of(*terms: LossTerm) -> LossTerms:
    return LossTerms(terms=terms, rewards={}, logps={})


COUNTS = StepCounts(num_pairs=8.0, num_tokens={"chosen": 10.0, "gold": 4.0}, num_micro_batches=2.0)


def test_each_unit_has_its_own_denominator():
    """Pairs: 3 (1 + 2) / 8; tokens of chosen: 0.5 (1 + 2 + 3) / 10; of gold: 2 x 4 / 4; the micro-batch: 6 / 2."""
    batch = make_batch(make_layout({"chosen": [1, 2], "rejected": [1, 1], "gold": [0, 1]}))
    shares = [
        (LossTerm("pair", torch.tensor([1.0, 2.0]), unit="pair", weight=3.0), 9 / 8),
        (LossTerm("chosen", torch.tensor([1.0, 2.0, 3.0]), unit="token", weight=0.5, branch="chosen"), 0.3),
        (LossTerm("gold", torch.tensor([4.0]), unit="token", weight=2.0, branch="gold"), 2.0),
        (LossTerm("aux", torch.tensor(6.0), unit="micro_batch"), 3.0),
    ]
    for term, expected in shares:
        assert total(terms_of(term), batch, COUNTS).item() == pytest.approx(expected)
    everything = total(terms_of(*(term for term, _ in shares)), batch, COUNTS)
    assert everything.shape == ()
    assert everything.item() == pytest.approx(sum(expected for _, expected in shares))


def test_dummies_count_nothing_even_where_they_are_not_finite():
    layout = make_layout({"chosen": [1, 2], "rejected": [1, 1]})
    values = torch.tensor([float("nan"), float("inf")], requires_grad=True)
    terms = terms_of(
        LossTerm("pair", values * 2, unit="pair"),
        LossTerm("token", torch.full((3,), float("nan")), unit="token", branch="chosen"),
        LossTerm("aux", torch.tensor(float("nan")), unit="micro_batch"),
    )
    loss = total(terms, make_batch(layout, weight=0.0), COUNTS)
    loss.backward()
    assert loss.item() == 0
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0]


def test_a_real_pair_that_is_not_finite_shows():
    layout = make_layout({"chosen": [1, 1], "rejected": [1, 1]})
    terms = terms_of(LossTerm("pair", torch.tensor([float("nan"), 0.0]), unit="pair"))
    assert total(terms, make_batch(layout), COUNTS).isnan()


def test_weights_are_per_pair():
    """A dummy next to pairs: its tokens and values are left out."""
    layout = make_layout({"chosen": [1, 2], "rejected": [1, 1]})
    batch = replace(make_batch(layout), pair_weights=torch.tensor([1.0, 0.0]))
    terms = terms_of(
        LossTerm("pair", torch.tensor([1.0, 100.0]), unit="pair"),
        LossTerm("token", torch.tensor([1.0, 100.0, 100.0]), unit="token", branch="chosen"),
    )
    counts = local_counts([batch])
    assert (float(counts.num_pairs), float(counts.num_tokens["chosen"])) == (1, 1)
    assert total(terms, batch, counts).item() == 2


def test_the_sum_of_a_term_comes_with_its_units_and_without_its_weight():
    batch = replace(
        make_batch(make_layout({"chosen": [1, 2], "rejected": [1, 1]})), pair_weights=torch.tensor([0.0, 1.0])
    )
    pair = LossTerm("pair", torch.tensor([9.0, 2.0]), unit="pair", weight=3.0)
    token = LossTerm("token", torch.tensor([9.0, 2.0, 5.0]), unit="token", weight=3.0, branch="chosen")
    aux = LossTerm("aux", torch.tensor(4.0), unit="micro_batch", weight=3.0)
    assert [tuple(map(float, term_sum(term, batch))) for term in (pair, token, aux)] == [(2, 1), (7, 2), (4, 1)]


def test_local_counts():
    """Three micro-batches, the last of dummies: 3 pairs, 1 + 2 + 4 chosen and 3 + 2 + 1 rejected tokens in 2."""
    batches = [
        make_batch(make_layout({"chosen": [1, 2], "rejected": [3, 2]})),
        make_batch(make_layout({"chosen": [4], "rejected": [1]})),
        make_batch(make_layout({"chosen": [9], "rejected": [9]}), weight=0.0),
    ]
    counts = local_counts(batches)
    assert float(counts.num_pairs) == 3
    assert {branch: float(n) for branch, n in counts.num_tokens.items()} == {"chosen": 7, "rejected": 6}
    assert float(counts.num_micro_batches) == 2


def weighted_gradient(objective: Objective, ranks: list[list[range]], weights: list[float]) -> torch.Tensor:
    """Gradient of the step whose pairs have these weights, split into ``ranks`` of micro-batches."""
    leaf = whole_step()[0].detach().requires_grad_()
    batches = [
        replace(
            make_batch(make_layout(micro_batch(pairs)[1])), row_weights=torch.tensor([weights[pair] for pair in pairs])
        )
        for rank in ranks
        for pairs in rank
    ]
    counts = local_counts(batches)
    for batch, pairs in zip(batches, (pairs for rank in ranks for pairs in rank), strict=True):
        share(objective, pairs, counts, leaf, batch=batch).backward()
    assert leaf.grad is not None
    return leaf.grad


ROW_WEIGHTS = [2.0, 1.0, 0.0, 1.0, 3.0, 1.0, 0.0, 1.0]
COPIES = [0, 0, 1, 3, 4, 4, 4, 5, 7]
"""The pairs as often as the weights say."""


@pytest.mark.parametrize("split", ["4x2", "1x8", "uneven", "two ranks"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_is_how_often_a_row_counts(name, split):
    """In pair losses and NLLs, in every split; so is any multiple of the weights, whatever their sum."""
    leaf = whole_step()[0].detach().requires_grad_()
    copies = [range(pair, pair + 1) for pair in COPIES]
    counts = local_counts([make_batch(make_layout(micro_batch(pairs)[1])) for pairs in copies])
    for pairs in copies:
        share(OBJECTIVES[name], pairs, counts, leaf, 1.0).backward()
    expected = leaf.grad
    assert expected is not None
    ranks = [[pairs for pairs, _ in rank] for rank in SPLITS[split]]
    for scale in (1.0, 0.01):
        actual = weighted_gradient(OBJECTIVES[name], ranks, [scale * weight for weight in ROW_WEIGHTS])
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_weights_by_hand():
    """Pairs: (2 x 1 + 0.5 x 4) / 2.5 = 1.6; tokens of chosen: (2 x 1 + 0.5 (3 + 5)) / (2 x 1 + 0.5 x 2) = 2."""
    layout = make_layout({"chosen": [1, 2], "rejected": [4, 1]})
    batch = replace(make_batch(layout), row_weights=torch.tensor([2.0, 0.5]))
    counts = local_counts([batch])
    assert (float(counts.num_pairs), float(counts.num_micro_batches)) == (2.5, 1)
    assert {branch: float(n) for branch, n in counts.num_tokens.items()} == {"chosen": 3, "rejected": 8.5}
    pair = LossTerm("pair", torch.tensor([1.0, 4.0]), unit="pair")
    token = LossTerm("token", torch.tensor([1.0, 3.0, 5.0]), unit="token", branch="chosen")
    assert total(terms_of(pair), batch, counts).item() == pytest.approx(1.6)
    assert total(terms_of(token), batch, counts).item() == pytest.approx(2)
    assert tuple(map(float, term_sum(pair, batch))) == (4, 2.5)


def test_rows_of_weight_zero_count_nothing_but_are_no_dummies():
    """Even where they are not finite; a micro-batch of them still is one, for what is a function of it."""
    layout = make_layout({"chosen": [1, 1], "rejected": [1, 1]})
    batch = replace(make_batch(layout), row_weights=torch.tensor([0.0, 0.0]))
    counts = local_counts([batch])
    terms = terms_of(LossTerm("pair", torch.tensor([float("nan"), 1.0]), unit="pair"))
    assert total(terms, batch, counts).item() == 0
    aux = terms_of(LossTerm("aux", torch.tensor(3.0), unit="micro_batch"))
    assert total(aux, batch, counts).item() == 3


def test_a_dummy_has_no_weight_whatever_its_row_says():
    layout = make_layout({"chosen": [1], "rejected": [1]})
    batch = replace(make_batch(layout, weight=0.0), row_weights=torch.tensor([5.0]))
    assert float(local_counts([batch]).num_pairs) == 0


def test_a_step_without_pairs_is_zero():
    batch = make_batch(make_layout({"chosen": [1], "rejected": [1]}), weight=0.0)
    counts = local_counts([batch])
    assert total(terms_of(LossTerm("pair", torch.tensor([1.0]), unit="pair")), batch, counts).item() == 0
    assert float(local_counts([]).num_pairs) == 0
