"""The plan of a packed row says who sees whom, in every form that a kernel reads, and is made once a batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from attention_oracle import groups, paths_of_groups, table_of_groups, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_layouts import examples, tiny
from torch.nn.parallel import DistributedDataParallel

from prefopt.batching import pack_batch, share_batch
from prefopt.scoring.attention import plan as plans
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.attention.flex import make_block_mask, scopes
from prefopt.scoring.attention.plan import Plan, segment_mask
from prefopt.scoring.attention.varlen import path_index
from prefopt.scoring.forward import score, token_multiplicity
from prefopt.types import TRIPLE

CPU = torch.device("cpu")
windows = st.one_of(st.none(), st.integers(1, 12))


@given(groups=groups, window=windows)
def test_scopes_are_the_mask(groups: list, window: int | None) -> None:
    """FlexAttention's mask: a token is seen from its own place on, to the end of its scope, within the window."""
    end_of_scope, positions = scopes(Plan(table_of_groups(groups), CPU))
    index = torch.arange(len(positions))
    seen = (index[None] <= index[:, None]) & (index[:, None] < end_of_scope[None])
    if window is not None:
        seen &= positions[:, None] - positions[None] < window
    assert torch.equal(seen, visible(groups, window))


@given(groups=groups, window=windows)
@settings(max_examples=20, deadline=None)
def test_the_block_mask_is_the_mask(groups: list, window: int | None) -> None:
    """In a row padded to a multiple of 128 whose padding sees nothing and is not seen."""
    plan = Plan(table_of_groups(groups), CPU)
    block_mask = make_block_mask(plan, window)
    index = torch.arange(block_mask.shape[-1])
    seen = block_mask.mask_mod(0, 0, index[:, None], index[None])
    assert len(index) % 128 == 0
    assert torch.equal(seen[: plan.num_tokens, : plan.num_tokens], visible(groups, window))
    assert int(seen.sum()) == int(visible(groups, window).sum())


long_groups = st.lists(
    st.tuples(st.integers(0, 300), st.lists(st.integers(1, 300), min_size=1, max_size=3)), min_size=1, max_size=3
)


@given(groups=long_groups, window=st.one_of(st.none(), st.integers(1, 400)))
@settings(max_examples=30, deadline=None)
def test_no_block_with_a_visible_score_is_left_out(groups: list, window: int | None) -> None:
    """A kernel skips blocks that are not listed, and applies no mask to those that are listed as whole."""
    plan = Plan(table_of_groups(groups), CPU)
    block_mask = make_block_mask(plan, window)
    count = block_mask.shape[-1] // 128
    seen = torch.zeros(count * 128, count * 128, dtype=torch.bool)
    seen[: plan.num_tokens, : plan.num_tokens] = visible(groups, window)
    seen = seen.view(count, 128, count, 128).transpose(1, 2)
    masked = ordered(block_mask.kv_num_blocks, block_mask.kv_indices)
    whole = ordered(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert not (masked & whole).any()
    assert torch.equal(seen.any((2, 3)) & ~(masked | whole), torch.zeros_like(masked))
    assert seen.all((2, 3))[whole].all()
    if window is None:
        assert torch.equal(seen.all((2, 3)), whole)


def ordered(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[blocks, blocks] whether a block is listed."""
    listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for line, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        listed[line, columns[:count].long()] = True
    return listed


@given(groups=groups)
def test_paths_are_the_mask(groups: list) -> None:
    """Each segment's queries stand at the lower right of the keys that were gathered for it."""
    plan = Plan(table_of_groups(groups), CPU)
    index = path_index(plan)
    keys = torch.arange(plan.num_tokens) if index.keys is None else index.keys
    seen = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.bool)
    queries, paths = index.cu_seqlens_q.tolist(), index.cu_seqlens_k.tolist()
    for start, end, first, last in zip(queries, queries[1:], paths, paths[1:], strict=False):
        for query in range(start, end):
            seen[query, keys[first : last - (end - 1 - query)]] = True
    assert torch.equal(seen, visible(groups))
    assert index.cu_seqlens_q.dtype == index.cu_seqlens_k.dtype == torch.int32
    assert index.max_q == max(b - a for a, b in pairwise(queries))
    assert index.max_k == max(b - a for a, b in pairwise(paths))


@given(groups=groups, window=windows)
def test_masks_are_the_mask(groups: list, window: int | None) -> None:
    seen = visible(groups, window)
    for start, end, prefix_start, prefix_end in table_of_groups(groups):
        mask = segment_mask(end - start, prefix_end - prefix_start, window, torch.zeros(1))[0, 0]
        path = [*range(prefix_start, prefix_end), *range(start, end)]
        assert torch.equal(mask == 0, seen[start:end, path])


@given(groups=groups)
def test_a_token_counts_once_for_each_completion_it_serves(groups: list) -> None:
    carrier = torch.tensor(table_of_groups(groups)).view(1, 1, -1, 4)
    counts = torch.zeros(carrier[0, 0, -1, 1], dtype=torch.int64)
    for path in paths_of_groups(groups):
        counts[path] += 1
    assert torch.equal(token_multiplicity(carrier)[0], counts)


def test_a_prompt_and_its_first_completion_are_one_segment() -> None:
    pairs = examples(3)[3:]
    prompt, lengths = len(pairs[0].prompt_ids), [len(pairs[0].completion_ids[branch]) for branch in TRIPLE]
    batch = share_batch(pairs, TRIPLE)
    assert batch.segments == table_of_groups([(prompt, lengths)])
    assert batch.model_inputs["attention_mask"][0, 0].tolist() == [list(segment) for segment in batch.segments]


@pytest.mark.parametrize(
    "segments",
    [
        ((0, 5, 0, 0), (6, 9, 6, 6)),  # a token that belongs to nobody
        ((0, 5, 0, 0), (5, 5, 5, 5)),  # nothing
        ((0, 5, 0, 0), (5, 9, 1, 3)),  # not the beginning
        ((0, 5, 0, 0), (5, 9, 0, 7)),  # more than the first segment
        ((0, 5, 0, 0), (5, 9, 5, 5), (9, 12, 0, 3)),  # of a group that has ended
        ((0, 5, 0, 0), (5, 9, 0, 2), (9, 12, 0, 4)),  # the segment between would see tokens 2 and 3
    ],
)
def test_a_table_that_kernels_would_get_wrong_is_refused(segments: tuple) -> None:
    with pytest.raises(AssertionError, match=r"tile the row|beginning of its group"):
        Plan(segments, CPU)


def test_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    made = []
    original = plans.segment_mask
    monkeypatch.setattr(plans, "segment_mask", lambda *args: made.append(args[:3]) or original(*args))
    batch = share_batch(examples(1), TRIPLE)
    with segment_attention(model):
        score(model, batch)
    assert len(made) == len(set(made)) > 1


# -- wrappers hand the very tensor to the model, which knows its segments ----------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list:
    """Reads of a tensor's content on the host."""
    found: list = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: found.append(self.shape) or original(self))
    return found


@pytest.mark.parametrize("wrapper", ["peft", "ddp", "mixed precision"])
def test_no_wrapper_copies_the_carrier(wrapper: str, process_group: None, reads: list) -> None:
    model = tiny("llama").train()
    wrapped: torch.nn.Module = model
    if wrapper == "peft":
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elif wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:  # as accelerate does it
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    for batch in (share_batch(examples(1), TRIPLE), pack_batch(examples(1), TRIPLE).to("cpu")):
        with segment_attention(model):
            score(wrapped, batch).tokens.logps.sum().backward()
    assert not reads
