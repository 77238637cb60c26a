"""In bfloat16 the layouts differ by less than two runs of the padded layout may, for every family."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import FAMILIES, LAYOUTS, groups, objective, reference_of, tiny
from torch import Tensor, nn

from prefopt.normalise import local_counts, total
from prefopt.reference.policy import ModelReference, SeparateModel
from prefopt.scoring.attention import segment_attention
from prefopt.step import preference_step
from prefopt.types import TokenizedExample

SEEDS = range(3)
TWO_RUNS = 2.0
"""A bfloat16 run is off the float32 run of the same weights by some error. Two such runs (other kernels, widths, orders
of summation) may be twice that error apart, so the layouts may be, too. Measured: 0 to 0.9, and 1.6 where a rounding
sends a token to another expert."""
NO_WORSE = 2.0
"""How far a layout may be off float32, in units of what the padded one is off. Measured: 0.8 to 1.2, and 1.6 there."""


def run(model: nn.Module, reference: ModelReference, layout: str, pairs: list[TokenizedExample]) -> tuple[Tensor, ...]:
    """[2 P] log-probs of the completions under the policy, and the gradient of the loss."""
    wanted = objective("dpo")
    batch = LAYOUTS[layout](pairs, wanted.branches)
    model.zero_grad()
    with segment_attention(model, reference.model):
        result = preference_step(model, reference, batch, wanted)
        total(result.terms, batch, local_counts([batch])).backward()
    logps = torch.cat([result.policy[branch].sum_logps for branch in wanted.branches])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logps.detach().double(), gradient.double()


def distance(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]], index: int) -> float:
    """Root mean square over the seeds of the relative distance of log-probs (``index`` 0) or gradients (1)."""
    pairs = [(one[index], other[index]) for one, other in zip(ours, theirs, strict=True)]
    squares = [((one - other).norm() / other.norm()).item() ** 2 for one, other in pairs]
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_within_the_noise_of_bfloat16(family: str) -> None:
    model = tiny(family).bfloat16()
    reference = reference_of(model)
    exact = deepcopy(model).float()
    exact_reference = SeparateModel(deepcopy(reference.model).float(), derives_from_policy=False)
    batches = [groups(seed, count=6) for seed in SEEDS]
    truth = [run(exact, exact_reference, "padded", pairs) for pairs in batches]
    runs = {layout: [run(model, reference, layout, pairs) for pairs in batches] for layout in LAYOUTS}
    for index, name in enumerate(("log-probs", "gradient")):
        noise = distance(runs["padded"], truth, index)
        assert noise > 1e-6, "the model was not run in bfloat16"
        for layout in ("packed", "shared_prompt"):
            assert distance(runs[layout], runs["padded"], index) < TWO_RUNS * noise, (layout, name)
            assert distance(runs[layout], truth, index) < NO_WORSE * noise, (layout, name)
