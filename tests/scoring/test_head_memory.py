"""What the head keeps and makes: by the tensors that autograd saves, and by all that are ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import HIDDEN_SIZE, MODES, NUM_TOKENS, STATISTICS, VOCAB_SIZE, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.scoring.head import buffers, plan, products
from prefopt.scoring.head.buffers import Buffer
from prefopt.scoring.head.function import factored_stats
from prefopt.scoring.transforms import LogitTransform

TILE = 3
ALL_LOGITS = NUM_TOKENS * VOCAB_SIZE
CPU = torch.device("cpu")


class Largest(TorchDispatchMode):
    """The most numbers in the storage of any tensor that an operator gave, but for those of ``known`` tensors."""

    def __init__(self, known: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.known = {tensor.data_ptr() for tensor in known}
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "tile_rows", lambda *_: TILE)


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "free", [])


def saved(mode: str, kind: str = "plain") -> list[int]:
    """Sizes of the tensors that are kept for the backward pass, the largest first; leaves do not count."""
    case = make_case(kind, frozen=mode == "frozen")
    leaves = {leaf.data_ptr() for leaf in (*case.leaves, case.targets)}
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in leaves:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
    return sorted(sizes, reverse=True)


def test_what_is_saved() -> None:
    """Frozen: a gradient for each input. Recompute: lse. Cached: that, the gradients of the logits and their scale."""
    assert saved("frozen") == [NUM_TOKENS * HIDDEN_SIZE]
    assert saved("recompute") == [NUM_TOKENS]
    assert saved("cached") == [ALL_LOGITS, NUM_TOKENS, NUM_TOKENS]


@pytest.mark.parametrize("mode", MODES)
def test_a_tile_is_all_that_is_held(mode: str) -> None:
    """Nothing that is made, forward or backward, is larger than a tile, a gradient of a leaf or what is cached."""
    case = make_case("plain", frozen=mode == "frozen")
    with Largest(case.leaves) as made:
        stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
        case.gradients(stats)
    largest = {"frozen": TILE * VOCAB_SIZE, "recompute": VOCAB_SIZE * HIDDEN_SIZE, "cached": ALL_LOGITS}
    assert made.numbers == largest[mode]
    assert TILE * VOCAB_SIZE < VOCAB_SIZE * HIDDEN_SIZE < ALL_LOGITS


def test_without_a_gradient_nothing_is_kept() -> None:
    case = make_case("plain")
    with torch.no_grad(), Largest(case.leaves) as made:
        stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS)
    assert stats.logps.grad_fn is None
    assert made.numbers == TILE * VOCAB_SIZE


def test_tiles_have_full_matrix_rate_and_bounded_memory() -> None:
    assert plan.tile_rows(64_000, CPU) == 512
    assert plan.tile_rows(2**30, CPU) == plan.MIN_ROWS
    assert plan.tile_rows(300_000, torch.device("cuda")) * 300_000 <= plan.TILE_BYTES
    assert [(t.start, t.stop) for t in plan.tiles(2, 9, 3)] == [(2, 5), (5, 8), (8, 9)]
    assert [(t.start, t.stop) for t in plan.tiles(0, 0, 3)] == [(0, 0)]
    assert list(plan.tiles(4, 4, 3)) == []


# -- buffers -----------------------------------------------------------------------------------------------------------


def buffer(num_rows: int) -> Buffer:
    return Buffer(num_rows, 1 << 18, torch.float32, CPU)


def test_memory_is_used_again() -> None:
    small, large = buffer(1), buffer(3)
    where = {name: each.rows.data_ptr() for name, each in (("small", small), ("large", large))}
    small.give_back()
    large.give_back()
    assert buffer(2).rows.data_ptr() == where["large"]
    assert buffer(1).rows.data_ptr() == where["small"]
    assert buffer(1).rows.shape == (1, 1 << 18)


def test_little_waits() -> None:
    """At most two buffers, and one that has become too small makes room for the one that replaces it."""
    for rows in (1, 2, 3):
        taken = [buffer(rows), buffer(rows)]
        for each in taken:
            each.give_back()
        assert [memory.numel() >> 20 for memory in buffers.free] == [rows, rows]
    buffer(4).give_back()
    assert [memory.numel() >> 20 for memory in buffers.free] == [3, 4]


def test_small_memory_is_left_to_the_allocator() -> None:
    Buffer(3, 5, torch.float32, CPU).give_back()
    assert buffers.free == []


@pytest.mark.parametrize("mode", MODES)
def test_steps_use_the_same_memory(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALL_BYTES", 0)
    held = []
    for seed in range(3):
        case = make_case("plain", frozen=mode == "frozen", seed=seed)
        stats = factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode)  # type: ignore[arg-type]
        for ours, theirs in zip(case.gradients(stats), case.expected(LogitTransform())[1], strict=True):
            torch.testing.assert_close(ours, theirs)
        held.append([memory.data_ptr() for memory in buffers.free])
    assert held[0]
    assert held[0] == held[1] == held[2]


def test_two_graphs_at_a_time_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALL_BYTES", 0)
    cases = [make_case("plain", seed=seed) for seed in range(2)]
    stats = [factored_stats(case.factors, case.targets, LogitTransform(), mode="cached") for case in cases]
    for case, found in zip(cases, stats, strict=True):
        for ours, theirs in zip(case.gradients(found), case.expected(LogitTransform())[1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_cached_gradients_that_were_written_over_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backward pass over a graph whose memory another step has had since."""
    monkeypatch.setattr(buffers, "SMALL_BYTES", 0)
    case = make_case("plain")
    stats = factored_stats(case.factors, case.targets, LogitTransform(), mode="cached")
    case.gradients(stats)
    factored_stats(case.factors, case.targets, LogitTransform(), mode="cached")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradients(stats)


def test_inputs_are_left_as_they_are() -> None:
    for mode in MODES:
        case = make_case("bias", frozen=mode == "frozen")
        before = [leaf.detach().clone() for leaf in case.leaves]
        case.gradients(factored_stats(case.factors, case.targets, LogitTransform(), STATISTICS, mode))  # type: ignore[arg-type]
        assert all(torch.equal(leaf, copy) for leaf, copy in zip(case.leaves, before, strict=True))


def test_a_gradient_that_is_one_number_expanded() -> None:
    """What comes from above need not be a tensor of its own."""
    for mode in MODES:
        case = make_case("plain", frozen=mode == "frozen")
        stats = factored_stats(case.factors, case.targets, LogitTransform(), mode=mode)  # type: ignore[arg-type]
        expected = case.logits(LogitTransform()).log_softmax(-1).gather(-1, case.targets[:, None])
        found = torch.autograd.grad(stats.logps.sum(), case.trained)
        for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), case.trained), strict=True):
            torch.testing.assert_close(ours, theirs)
