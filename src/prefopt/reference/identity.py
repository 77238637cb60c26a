"""Before the first step, a reference that derives from the policy must agree with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prefopt.types import Branch, SequenceStats

__all__ = ["IDENTITY_NOISE", "check_identity"]

IDENTITY_NOISE: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Nats by which one token's log-prob may differ between two passes of the same weights.

The same kernels give the same bits, but a pass with gradient may take others (checkpointing, compilation, attention).
Then the rounding of the logits is what differs: logits of about 20 are known to 2^-8 of that in bfloat16, 2^-11 in
float16 (also TF32), 2^-23 in float32, a little of it lost in every layer. The errors of a completion's tokens are
independent, so their sum grows with the square root of their number. A wrong reference is far outside: 0.2 and more.
"""

CAUSES = (
    "Likely causes: the model was changed after the trainer was made, dropout is on in the policy, or the model gives "
    "different results in training mode. To train against a reference of your choice, give `ref_model`."
)


def check_identity(
    policy: Mapping[Branch, SequenceStats],
    reference: Mapping[Branch, SequenceStats],
    *,
    rows: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Hold the log-probs of both against each other; call it once, on the first micro-batch of a fresh run.

    Only for a reference with ``derives_from_policy``, with the policy's dropout off.

    Args:
        policy: branch -> [P] statistics of the policy.
        reference: the same of the reference; branches that it lacks are not compared.
        rows: [P] row numbers, for the message.
        dtype: precision of the computation (the autocast type, where there is one).

    Raises:
        ValueError: a completion differs by more than rounding; names its row and the likely causes.
    """
    noise = tolerance(dtype)
    for branch, theirs in reference.items():
        ours = policy[branch]
        allowed = noise * ours.num_tokens.sqrt()
        difference = (ours.sum_logps.detach() - theirs.sum_logps).abs()
        # A NaN compares as false, so ask for what is right.
        wrong = ~(difference <= allowed) & (ours.num_tokens > 0)
        if bool(wrong.any()):
            raise ValueError(message(branch, rows, wrong, ours.sum_logps, theirs.sum_logps, allowed))


def tolerance(dtype: torch.dtype) -> float:
    """`IDENTITY_NOISE`; float32 with TF32 switched on counts as float16."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return IDENTITY_NOISE[torch.float16]
    return IDENTITY_NOISE.get(dtype, IDENTITY_NOISE[torch.float32])


def message(
    branch: Branch, rows: Sequence[int], wrong: Tensor, policy: Tensor, reference: Tensor, allowed: Tensor
) -> str:
    """What the first offending pair shows."""
    pair = int(wrong.int().argmax())
    return (
        f"Policy and reference differ before the first step: row {rows[pair]}, {branch}: log p is "
        f"{policy[pair].item():.6g} under the policy and {reference[pair].item():.6g} under the reference (allowed: "
        f"{allowed[pair].item():.2g} nats), in {int(wrong.sum())} of {len(rows)} pairs. The reference is taken from "
        f"the policy's own weights, so both must agree. {CAUSES}"
    )
