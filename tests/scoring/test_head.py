"""The head's function against full logits in float64: every mode, kind of head, transform and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from head_cases import MODES, STATISTICS, TRANSFORMS, VOCAB_SIZE, Case, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.scoring.head import function, plan, products, rows, torch_rows
from prefopt.scoring.head.factors import Factors
from prefopt.scoring.head.function import factored_stats
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import TokenStats

KINDS = ("plain", "bias", "lora", "adapter")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-2}
"""Of values around 1 to 10. Rounding of one number is 1e-16, 6e-8 and 4e-3; sums of 37 numbers and the exponential of
logits around 10 make up to twenty times that."""


def assert_as_expected(case: Case, stats: TokenStats, transform: LogitTransform, dtype: torch.dtype) -> None:
    expected, gradients = case.expected(transform)
    close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype], "check_dtype": False}
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_prob"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), **close)
    if dtype != torch.bfloat16:  # where rounding decides which logit is the highest
        assert torch.equal(stats.is_top1, expected.is_top1)
    for ours, theirs, leaf in zip(case.gradients(stats), gradients, case.trained, strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours, theirs, **close)


@pytest.fixture(params=[4, 64], ids=["tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(products, "tile_rows", lambda *_: request.param)
    return request.param


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_statistics_and_gradients(mode: str, kind: str, transform: LogitTransform, dtype: torch.dtype) -> None:
    case = make_case(kind, dtype=dtype, frozen=mode == "frozen")
    stats = factored_stats(case.factors, case.targets, transform, STATISTICS, mode)  # type: ignore[arg-type]
    assert_as_expected(case, stats, transform, dtype)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    vocab_size=st.integers(2, 70),
    rows=st.integers(1, 9),
    cached=st.integers(0, 20),
    seed=st.integers(0, 10**6),
)
def test_any_tiles_and_any_share_of_cached_tokens(
    num_tokens: int, vocab_size: int, rows: int, cached: int, seed: int
) -> None:
    case = make_case("lora", seed=seed, num_tokens=num_tokens, vocab_size=vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "tile_rows", lambda *_: rows)
        patch.setattr(plan, "CPU_CACHE_BYTES", cached * vocab_size * 8)
        stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS)
        assert_as_expected(case, stats, LogitTransform(), torch.float64)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, transform: LogitTransform) -> None:
    case = make_case("bias", frozen=mode == "frozen", num_tokens=4, vocab_size=7)

    def logps(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        factors = Factors((hidden, case.factors.inputs[1]), (weight, bias[:, None]))
        return factored_stats(factors, case.targets, transform, mode=mode).logps  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(logps, case.leaves)


def test_modes_agree_to_the_last_bits() -> None:
    """The same product makes the logits of one tile in all modes; gradients differ by when they are scaled."""
    found = {}
    for mode in MODES:
        case = make_case("plain", dtype=torch.float32, frozen=mode == "frozen")
        stats = factored_stats(case.factors, case.targets, LogitTransform(), mode=mode)  # type: ignore[arg-type]
        found[mode] = (stats.logps, *case.gradients(stats))
    for mode in ("frozen", "recompute"):
        assert torch.equal(found[mode][0], found["cached"][0])
        torch.testing.assert_close(found[mode][1], found["cached"][1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["recompute"][2], found["cached"][2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_needs_a_gradient_gets_one(mode: str) -> None:
    case = make_case("plain")
    hidden, weight = case.leaves[0], case.leaves[1].detach()
    if mode != "frozen":
        hidden, weight = hidden.detach(), case.leaves[1]
    stats = factored_stats(Factors((hidden,), (weight,)), case.targets, LogitTransform(), mode=mode)  # type: ignore[arg-type]
    stats.logps.backward(case.upstream)
    expected = dict(zip(("hidden", "weight"), case.expected(LogitTransform())[1], strict=True))
    found = hidden.grad if mode == "frozen" else weight.grad
    torch.testing.assert_close(found, expected["hidden" if mode == "frozen" else "weight"])


def test_the_mode_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what needs a gradient, then by memory."""
    trained, frozen = make_case("plain").factors, make_case("plain", frozen=True).factors
    assert function.plan(frozen, torch.float64, None) == ("frozen", 0)
    assert function.plan(make_case("adapter").factors, torch.float64, None)[0] == "cached"
    for budget, expected in ((10**6, ("cached", 11)), (4 * VOCAB_SIZE * 8 + 1, ("cached", 4)), (7, ("recompute", 0))):
        monkeypatch.setattr(plan, "CPU_CACHE_BYTES", budget)
        assert function.plan(trained, torch.float64, None) == expected
    with torch.no_grad():
        assert function.plan(trained, torch.float64, None) == (None, 0)


def test_cuda_caches_within_a_share_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"mem_get_info": (300, 1000), "memory_reserved": 150, "memory_allocated": 50}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert plan.cache_budget(torch.device("cuda")) == plan.CUDA_SHARE * 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 1000))
    assert plan.cache_budget(torch.device("cuda")) == plan.CUDA_FREE_SHARE * 120
    with plan.uncached():
        assert plan.cache_budget(torch.device("cuda")) == 0


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode: str) -> None:
    """A micro-batch may have nothing to score; ranks still need its gradients, which are zero."""
    case = make_case("bias", frozen=mode == "frozen", num_tokens=0)
    stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    assert stats.logps.shape == stats.entropy.shape == stats.is_top1.shape == (0,)
    gradients = case.gradients(stats)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in case.trained]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_statistics_carry_no_gradient(mode: str | None) -> None:
    case = make_case("plain", frozen=mode == "frozen")
    stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    assert stats.logps.requires_grad
    assert not any(getattr(stats, name).requires_grad for name in STATISTICS)
    bare = factored_stats(case.factors, case.targets, LogitTransform(), frozenset(), mode)  # type: ignore[arg-type]
    assert all(getattr(bare, name) is None for name in STATISTICS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(mode: str, size: float) -> None:
    """One logit of 10,000 among zeros, or of -10,000: probabilities are 0, 1 and 1 / V, and so are the gradients."""
    hidden = torch.ones(3, 1, requires_grad=True)
    weight = torch.zeros(5, 1).index_fill_(0, torch.tensor([2]), size).requires_grad_(mode != "frozen")
    targets = torch.tensor([2, 0, 4])
    stats = factored_stats(Factors((hidden,), (weight,)), targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    rest = -1e4 if size > 0 else -math.log(4)
    assert stats.logps.tolist() == pytest.approx([0.0 if size > 0 else size - math.log(4), rest, rest], abs=1e-2)
    assert stats.entropy.tolist() == pytest.approx([0.0 if size > 0 else math.log(4)] * 3, abs=1e-6)
    assert stats.is_top1.tolist() == [size > 0, size < 0, False]
    stats.logps.sum().backward()
    assert hidden.grad[:, 0].tolist() == pytest.approx([0, -1e4, -1e4] if size > 0 else [-1e4, 0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_equal_logits(mode: str) -> None:
    """The first of equal logits is the highest, as for argmax."""
    case = make_case("plain", frozen=mode == "frozen", dtype=torch.float32)
    for leaf in case.leaves:
        leaf.data.fill_(0.5)
    stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    assert stats.logps.tolist() == pytest.approx([-math.log(VOCAB_SIZE)] * 11)
    assert stats.entropy.tolist() == pytest.approx([math.log(VOCAB_SIZE)] * 11)
    assert torch.equal(stats.is_top1, case.targets == 0)
    assert case.targets.eq(0).any()
    assert all(gradient.isfinite().all() for gradient in case.gradients(stats))


@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_is_refused(mode: str) -> None:
    case = make_case("plain", frozen=mode == "frozen")
    stats = factored_stats(case.factors, case.targets, LogitTransform(), mode=mode)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(stats.logps.sum(), case.leaves[0], create_graph=True)


def test_a_second_backward_pass() -> None:
    """With ``retain_graph`` the same graph gives the same gradients again."""
    for mode in MODES:
        case = make_case("lora", frozen=mode == "frozen")
        stats = factored_stats(case.factors, case.targets, LogitTransform(), mode=mode)  # type: ignore[arg-type]
        for first, second in zip(case.gradients(stats), case.gradients(stats), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_row_functions_in_two_passes(mode: str, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head makes of a device's two row functions, tried with torch's."""
    two_passes = rows.in_two_passes(torch_rows.row_stats, torch_rows.logit_gradients_)
    monkeypatch.setattr(function, "row_functions", lambda device_type: two_passes)
    case = make_case("lora", frozen=mode == "frozen", dtype=torch.float32)
    stats = factored_stats(case.factors, case.targets, transform, STATISTICS, mode)  # type: ignore[arg-type]
    assert_as_expected(case, stats, transform, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    """Logits in bfloat16, forward and when they are made again after autocast's end; gradients in the leaves' dtype."""
    case = make_case("lora", dtype=torch.float32, frozen=mode == "frozen")
    with torch.autocast("cpu", torch.bfloat16):
        stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    assert stats.logps.dtype == torch.float32
    assert_as_expected(case, stats, LogitTransform(), torch.bfloat16)
    exact = case.expected(LogitTransform())[0]
    assert (stats.logps - exact.logps).abs().max() > TOLERANCES[torch.float32]  # it was in bfloat16


def test_weight_gradients_of_half_precision_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two tokens, each with a gradient of (1 + 2^-9) / 2: bfloat16 holds neither that nor the sum of many."""
    monkeypatch.setattr(products, "tile_rows", lambda *_: 2)
    num_tiles = 600
    hidden, weight = torch.tensor([[1.0], [2**-9]]).repeat(num_tiles, 1), torch.zeros(2, 1, requires_grad=True)
    targets = torch.zeros(2 * num_tiles, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        stats = factored_stats(Factors((hidden,), (weight,)), targets, LogitTransform(), mode="recompute")
    stats.logps.sum().backward()
    exact = num_tiles * (1 + 2**-9) / 2
    assert weight.grad[:, 0].tolist() == [exact, -exact]


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_pass_within_autocast_is_that_of_the_forward(mode: str) -> None:
    case = make_case("plain", dtype=torch.float32, frozen=mode == "frozen")
    stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        found = case.gradients(stats)
    for ours, theirs in zip(found, case.gradients(stats), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_it_is_left_out_of_a_compiled_graph() -> None:
    case = make_case("plain")

    @torch.compile(backend="eager")
    def total(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return factored_stats(Factors((hidden * 1,), (weight,)), case.targets, LogitTransform()).logps.sum() * 2

    found = torch.autograd.grad(total(*case.leaves), case.leaves)
    expected = torch.autograd.grad(
        2 * case.logits(LogitTransform()).log_softmax(-1).gather(-1, case.targets[:, None]).sum(), case.leaves
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
