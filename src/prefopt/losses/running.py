"""BCO's reward shift: the one loss parameter that is learned from the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RewardShift"]


class RewardShift:
    """The running mean of the rewards of both sides, BCO's ``delta = (E[r(y_w)] + E[r(y_l)]) / 2``.

    The state is a mean and a count; it stays on the device until `state_dict` asks for it.

    Example:
        >>> import torch
        >>> shift = RewardShift()
        >>> shift.update(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 1.0]))
        >>> shift.value
        tensor(1.)
        >>> shift.update(torch.tensor([4.0]), torch.tensor([4.0]))
        >>> shift.state_dict()
        {'mean': 2.0, 'count': 6}

    References:
        BCO, arXiv:2404.04656.
    """

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0
        self.count = 0

    @property
    def value(self) -> Tensor | float:
        """[] the shift, no unit; 0 before the first update."""
        return self.mean

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
        """Take in the rewards of P pairs; [P] each, no unit."""
        rewards = torch.cat([chosen_rewards, rejected_rewards]).detach()
        self.count += rewards.numel()
        self.mean = self.mean + (rewards - self.mean).sum() / self.count

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, for a checkpoint's JSON."""
        return {"mean": float(self.mean), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.mean, self.count = float(state["mean"]), int(state["count"])
