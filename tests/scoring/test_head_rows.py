"""The row functions in torch against their definitions in float64, with several blocks of rows and with one."""

from __future__ import annotations

import pytest
import torch
from head_cases import STATISTICS, TRANSFORMS
from torch import Tensor

from prefopt.scoring.head import torch_rows
from prefopt.scoring.head.rows import RowStats, row_functions
from prefopt.scoring.head.torch_rows import logit_gradients_, row_stats, stats_and_gradients_
from prefopt.scoring.tokens import stats_of_logits
from prefopt.scoring.transforms import LogitTransform

NUM_ROWS, VOCAB_SIZE = 7, 50
TOLERANCE = 3e-6
"""In float32 of logits around 10, which round to 1e-6."""
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a gradient that is written in the dtype of the logits."""


@pytest.fixture(params=[1, 2, 100], ids=lambda count: f"blocks of {count}", autouse=True)
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", request.param * VOCAB_SIZE * 4)


def make_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and targets; some targets have the highest logit, the last one shares it with an earlier token."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(NUM_ROWS, VOCAB_SIZE)).to(dtype)
    targets = torch.randint(0, VOCAB_SIZE, (NUM_ROWS,))
    targets[:3] = logits[:3].argmax(-1)
    logits[-1, 5] = logits[-1, 9] = 30
    targets[-1] = 9
    return logits, targets


def expected(logits: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics by name, and d log p(target) / d logits."""
    raw = logits.detach().double().clone().requires_grad_()
    z = transform(raw)
    stats = stats_of_logits(z, targets, STATISTICS)
    (gradients,) = torch.autograd.grad(stats.logps.sum(), raw)
    by_name = {name: getattr(stats, name) for name in ("logps", *STATISTICS)}
    return by_name | {"lse": z.logsumexp(-1), "target_logit": z.gather(-1, targets[:, None])[:, 0]}, gradients


def assert_as_defined(stats: RowStats, by_name: dict[str, Tensor]) -> None:
    for name, value in by_name.items():
        close = {"rtol": TOLERANCE, "atol": TOLERANCE, "check_dtype": False}
        torch.testing.assert_close(getattr(stats, name), value.detach(), **close)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_statistics(dtype: torch.dtype, transform: LogitTransform, overwrite: bool) -> None:
    logits, targets = make_rows(dtype)
    by_name, _ = expected(logits, targets, transform)
    before = logits.clone()
    assert_as_defined(row_stats(logits, targets, transform.factor, transform.cap, STATISTICS, overwrite), by_name)
    assert overwrite or torch.equal(logits, before)
    if transform == LogitTransform():
        assert by_name["is_top1"].tolist() == [True] * 3 + [False] * 4
        assert logits.shape == before.shape


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gradients(dtype: torch.dtype, transform: LogitTransform) -> None:
    """In one go, and from lse with a scale."""
    logits, targets = make_rows(dtype)
    by_name, gradients = expected(logits, targets, transform)
    close = {"rtol": TOLERANCE + ROUNDING[dtype], "atol": TOLERANCE, "check_dtype": False}
    scale = torch.randn(NUM_ROWS)
    arguments = (transform.factor, transform.cap)

    at_once = logits.clone()
    stats, row_scale = stats_and_gradients_(at_once, targets, *arguments, STATISTICS)
    assert_as_defined(stats, by_name)
    torch.testing.assert_close(at_once.double() * row_scale[:, None].double(), gradients, **close)

    again = logits.clone()
    assert logit_gradients_(again, stats.lse, targets, scale, *arguments) is again
    torch.testing.assert_close(again.double(), gradients * scale[:, None].double(), **close)


def test_tokens_that_a_model_rules_out() -> None:
    """Logits of -inf add nothing to sums over probabilities; only the mean of the logits is -inf too."""
    logits, targets = make_rows(torch.float32)
    logits[:, 11:17] = -torch.inf
    targets[(targets >= 11) & (targets < 17)] = 0
    kept = [index for index in range(VOCAB_SIZE) if not 11 <= index < 17]
    places = torch.tensor([kept.index(target) for target in targets.tolist()])
    by_name, _ = expected(logits[:, kept], places, LogitTransform())
    by_name["mean_logit"] = torch.full((NUM_ROWS,), -torch.inf)
    assert_as_defined(row_stats(logits, targets, 1.0, None, STATISTICS), by_name)
    stats, _ = stats_and_gradients_(logits, targets, 1.0, None, STATISTICS)
    assert_as_defined(stats, by_name)
    assert (logits[:, 11:17] == 0).all()


def test_what_is_not_asked_for_is_not_there() -> None:
    stats = row_stats(*make_rows(torch.float32), 1.0, None, frozenset())
    assert {name for name, value in vars(stats).items() if value is not None} == {"lse", "target_logit"}


def test_no_rows() -> None:
    logits, targets = torch.empty(0, 5), torch.empty(0, dtype=torch.long)
    stats = row_stats(logits, targets, 1.0, None, STATISTICS)
    assert all(value.shape == (0,) for value in vars(stats).values())
    assert logit_gradients_(logits, stats.lse, targets, torch.empty(0), 1.0, None).shape == (0, 5)
    assert stats_and_gradients_(logits, targets, 1.0, None, frozenset())[1].shape == (0,)


def test_half_precision_gradients_of_large_vocabularies_are_finite() -> None:
    """Their sum of exponentials, 100,000, is beyond what float16 holds."""
    logits = torch.zeros(2, 100_000, dtype=torch.float16)
    _, scale = stats_and_gradients_(logits, torch.tensor([0, 7]), 1.0, None, frozenset())
    gradients = logits.float() * scale[:, None]
    assert gradients[:, 1].tolist() == pytest.approx([-1e-5, -1e-5], rel=1e-2)
    assert [gradients[0, 0].item(), gradients[1, 7].item()] == pytest.approx([1, 1], rel=1e-3)


def test_a_processor_takes_torchs_functions() -> None:
    assert row_functions("cpu").logit_gradients_ is logit_gradients_
    assert row_functions("cpu").stats_and_gradients_ is stats_and_gradients_
