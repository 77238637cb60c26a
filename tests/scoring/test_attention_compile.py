"""Compiled layers and kernels: what is compiled for one batch serves every other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from attention_oracle import HEADS, dense_attention, random_inputs, table_of_groups, visible
from test_layouts import LAYOUTS, examples, tiny
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from prefopt.scoring.attention import flex, segment_attention
from prefopt.scoring.attention.options import LayerOptions
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.forward import score
from prefopt.types import TRIPLE

TOLERANCE = 1e-5
"""Nats and relative norm, float32: the same operations in another order."""

LENGTHS = ([(300, [150, 160])], [(90, [40, 30, 20]), (0, [500])], [(105, [100, 60])])
"""Rows of 5, 6 and 3 blocks: a compiler takes lengths that are 1, or equal at first, for the same ever after."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(list[GraphModule]):
    """A compiler that keeps the graphs and runs them as they are."""

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.append(graph)
        return graph.forward


def run(model: nn.Module, layout: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a batch and the gradient of a weighted sum of them."""
    model.zero_grad()
    with segment_attention(model):
        logps = score(model, LAYOUTS[layout](examples(seed, count), TRIPLE)).tokens.logps
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compiled_in_checkpoint(compiler: Graphs) -> Callable[..., Tensor]:
    """Checkpointing of a layer's compiled forward: what is compiled around a checkpoint breaks at the attention in it,
    and is then not compiled at all."""

    def checkpointed(function: partial, *args: Any) -> Tensor:
        compiled = torch.compile(function.func, backend=compiler, dynamic=True)
        return checkpoint(partial(compiled, *function.args, **function.keywords), *args, use_reentrant=False)

    return checkpointed


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("mistral", False), ("mistral", True)])
def test_new_lengths_compile_nothing(family: str, checkpointing: bool) -> None:
    """Layers compiled one by one, as for training; the attention between their graphs knows the batch."""
    model = tiny(family).train()
    batches = [("shared_prompt", 1, 4), ("packed", 2, 2), ("shared_prompt", 3, 1), ("shared_prompt", 4, 7)]
    expected = [run(model, *batch) for batch in batches]
    graphs = Graphs()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        if checkpointing:
            layer._gradient_checkpointing_func = compiled_in_checkpoint(graphs)
        else:
            layer.compile(backend=graphs, dynamic=True)
    counts = []
    for batch, (logps, gradient) in zip(batches, expected, strict=True):
        found, found_gradient = run(model, *batch)
        assert (found - logps).abs().max() < TOLERANCE
        assert (found_gradient - gradient).norm() / gradient.norm() < TOLERANCE
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[-1], counts


@pytest.mark.parametrize("window", [False, True])
def test_flex_attention_is_compiled_once_for_all_lengths_and_windows(
    window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs()
    monkeypatch.setattr(flex, "flex_kernel", lambda: torch.compile(flex_attention, backend=graphs, dynamic=True))
    counts = []
    for index, groups in enumerate(LENGTHS):
        options = LayerOptions(softcap=5.0, window=20 + index if window else None, sinks=torch.zeros(HEADS))
        plan = Plan(table_of_groups(groups), torch.device("cpu"))
        inputs = [tensor.detach() for tensor in random_inputs(plan.num_tokens, dtype=torch.float32)]
        found = flex.attend_flex(*inputs, plan, options)
        assert (found - dense_attention(inputs, visible(groups, options.window), options)).abs().max() < TOLERANCE
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[-1], counts
