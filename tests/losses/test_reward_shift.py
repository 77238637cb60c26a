"""BCO's running reward shift."""

from __future__ import annotations

import json

import pytest
import torch

from prefopt.losses import RewardShift


def test_it_is_the_mean_of_all_rewards_of_both_sides_however_they_came():
    rewards = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    for sizes in ([12], [1] * 12, [5, 4, 3]):
        shift = RewardShift()
        for part in rewards.split(sizes, dim=1):
            shift.update(part[0], part[1])
        assert float(shift.value) == pytest.approx(rewards.mean().item(), abs=1e-6)
        assert shift.count == 24


def test_it_is_zero_before_the_first_update():
    assert RewardShift().value == 0


def test_it_keeps_no_graph():
    shift = RewardShift()
    shift.update(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True))
    assert isinstance(shift.value, torch.Tensor)
    assert not shift.value.requires_grad


def test_it_continues_from_a_checkpoint():
    first, second = RewardShift(), RewardShift()
    first.update(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for shift in (first, second):
        shift.update(torch.tensor([4.0]), torch.tensor([-2.0]))
    assert first.state_dict() == second.state_dict() == {"mean": 1.0, "count": 6}
