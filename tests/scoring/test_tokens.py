"""Token statistics against their definitions in float64, and the tiles against the whole."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.scoring import tokens as module
from prefopt.scoring.tokens import stats_of_logits, tiled_stats

STATISTICS = frozenset({"entropy", "mean_logit", "is_top1", "log_sum_sq_prob"})


def test_values_by_hand() -> None:
    """Logits (ln 1, ln 2, ln 5): p = (1/8, 2/8, 5/8), so every statistic is a short sum."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    stats = stats_of_logits(logits, torch.tensor([1]), STATISTICS)
    p = [1 / 8, 2 / 8, 5 / 8]
    assert stats.logps.item() == pytest.approx(math.log(2 / 8), abs=1e-6)
    assert stats.entropy.item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)
    assert stats.mean_logit.item() == pytest.approx(math.log(10) / 3, abs=1e-6)
    assert stats.log_sum_sq_prob.item() == pytest.approx(math.log(sum(x * x for x in p)), abs=1e-6)
    assert stats.is_top1.tolist() == [False]


def test_only_what_was_asked_for_is_computed() -> None:
    stats = stats_of_logits(torch.randn(2, 5), torch.tensor([0, 1]))
    assert stats.entropy is stats.mean_logit is stats.is_top1 is stats.log_sum_sq_prob is None


def test_statistics_beside_the_log_probs_carry_no_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    stats = stats_of_logits(logits, torch.tensor([0, 1, 2]), STATISTICS)
    assert stats.logps.requires_grad
    assert not any(getattr(stats, name).requires_grad for name in STATISTICS)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_tiles_equal_the_whole(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile * 11)
    head = torch.nn.Linear(6, 11)
    hidden, targets = torch.randn(10, 6, requires_grad=True), torch.randint(0, 11, (10,))
    weights = torch.randn(10)
    whole = stats_of_logits(head(hidden), targets, STATISTICS)
    expected = torch.autograd.grad((whole.logps * weights).sum(), [hidden, head.weight, head.bias])
    tiled = tiled_stats(head, hidden, targets, 11, STATISTICS)
    found = torch.autograd.grad((tiled.logps * weights).sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(tiled.logps, whole.logps)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(tiled, name), getattr(whole, name))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_tile_is_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the head sees more than a tile of tokens, forward and backward."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", 4 * 11)
    head, seen = torch.nn.Linear(6, 11), []

    def watched(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return head(rows)

    hidden = torch.randn(10, 6, requires_grad=True)
    tiled_stats(watched, hidden, torch.randint(0, 11, (10,)), 11).logps.sum().backward()
    assert seen == [4, 4, 2, 2, 4, 4] or sorted(seen) == [2, 2, 4, 4, 4, 4]
    assert max(seen) == 4


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 5000).bfloat16()
    targets = torch.randint(0, 5000, (4,))
    exact = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(stats_of_logits(logits, targets).logps.double(), exact, rtol=0, atol=1e-5)
