"""A reference that does not agree with the policy it was taken from stops the run before its first step."""

from __future__ import annotations

import pytest
import torch
from reference_models import batch_of, policy_stats, shake, tiny_llama

from prefopt.reference import check_identity, make_reference
from prefopt.types import Branch, SequenceStats

ROWS = (7, 8, 9)


def stats(sums: list[float], tokens: list[float]) -> SequenceStats:
    return SequenceStats(torch.tensor(sums), torch.tensor(tokens))


def both(chosen: list[float], rejected: list[float]) -> dict[Branch, SequenceStats]:
    return {"chosen": stats(chosen, [4, 9, 16]), "rejected": stats(rejected, [4, 9, 0])}


REFERENCE = both([-10, -20, -30], [-11, -21, 0])


def test_equal_passes() -> None:
    check_identity(REFERENCE, REFERENCE, rows=ROWS, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False)])
def test_allowed_grows_with_the_root_of_the_length(dtype: torch.dtype, factor: float, passes: bool) -> None:
    """Noise per token times sqrt(9) for the second pair."""
    noise = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    policy = both([-10, -20, -30], [-11, -21 + factor * noise * 3, 0])
    if passes:
        check_identity(policy, REFERENCE, rows=ROWS, dtype=dtype)
        return
    with pytest.raises(ValueError, match=r"row 8, rejected: log p is -2.* in 1 of 3 pairs"):
        check_identity(policy, REFERENCE, rows=ROWS, dtype=dtype)


def test_a_nan_is_a_difference() -> None:
    with pytest.raises(ValueError, match="row 9, chosen"):
        check_identity(both([-10, -20, float("nan")], [-11, -21, 0]), REFERENCE, rows=ROWS, dtype=torch.float32)


def test_a_dummy_is_not_compared() -> None:
    check_identity(both([-10, -20, -30], [-11, -21, 5]), REFERENCE, rows=ROWS, dtype=torch.float32)


def test_tf32_counts_as_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = both([-10.01, -20, -30], [-11, -21, 0])
    with pytest.raises(ValueError, match="row 7, chosen"):
        check_identity(policy, REFERENCE, rows=ROWS, dtype=torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    check_identity(policy, REFERENCE, rows=ROWS, dtype=torch.float32)


def test_a_model_changed_after_its_snapshot_is_noticed() -> None:
    model, batch = tiny_llama(), batch_of()
    reference = make_reference(model)
    check_identity(policy_stats(model, batch), reference(batch), rows=batch.rows, dtype=torch.float32)
    shake(model)
    with pytest.raises(ValueError, match="the model was changed after the trainer was made"):
        check_identity(policy_stats(model, batch), reference(batch), rows=batch.rows, dtype=torch.float32)
