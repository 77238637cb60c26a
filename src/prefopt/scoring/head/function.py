"""Log-probs and statistics of tokens from hidden states: differentiable, and never with all logits in memory.

Logits are a sum of products ``x_i @ W_i^T`` (`factors`). With ``U = d logp / d logits``, a row for each of n tokens,
and the gradient ``g`` [n] that comes from above:

    d loss / d x_i = diag(g) U W_i            d loss / d W_i = U^T diag(g) x_i

U does not depend on g. It is therefore made in the forward, in place of the logits, where it is used up there (mode
``frozen``) or can be kept (mode ``cached``); the backward is then nothing but matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.scoring.head.factors import Factors
from prefopt.scoring.head.plan import Mode, choose_mode
from prefopt.scoring.head.products import Gradients, Products, scaled
from prefopt.scoring.head.rows import RowStats, concatenate, row_functions
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import Statistic, TokenStats

__all__ = ["factored_stats"]


@torch.compiler.disable
def factored_stats(
    factors: Factors,
    targets: Tensor,
    transform: LogitTransform,
    statistics: frozenset[Statistic] = frozenset(),
    mode: Mode | None = None,
) -> TokenStats:
    """Statistics of N tokens whose logits are ``transform(sum_i x_i @ W_i^T)``.

    Under autocast the logits are computed in its dtype, else in that of the first weight. Sums over the vocabulary are
    taken in float32.

    Args:
        factors: inputs and weights of the head.
        targets: [N] token ids.
        transform: what the model does to its logits.
        statistics: what is wanted beyond the log-probs; without a gradient.
        mode: of the backward pass; where it is None, chosen by what needs a gradient and by memory.
    """
    device = targets.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else factors.weights[0].dtype
    mode, num_cached = plan(factors, dtype, mode)
    job = Job(dtype, transform, tuple(sorted(statistics)), num_cached)
    tensors = (*(x.to(dtype) for x in factors.inputs), *factors.weights)
    if mode is None:
        columns = job.columns(tile_stats(job, targets, Products(tensors, dtype)))
    else:
        columns = (FrozenHead if mode == "frozen" else TrainedHead).apply(job, targets, *tensors)
    return TokenStats(**dict(zip(("logps", *job.statistics), columns, strict=True)))  # type: ignore[arg-type]


def plan(factors: Factors, dtype: torch.dtype, wanted: Mode | None) -> tuple[Mode | None, int]:
    """The mode, None where nothing needs a gradient, and how many tokens are cached."""
    weights_need_grad = any(weight.requires_grad for weight in factors.weights)
    if not torch.is_grad_enabled() or not (weights_need_grad or any(x.requires_grad for x in factors.inputs)):
        return None, 0
    num_tokens, device = len(factors.inputs[0]), factors.inputs[0].device
    if wanted is None:
        row_bytes = len(factors.weights[0]) * dtype.itemsize
        return choose_mode(num_tokens, row_bytes, device, weights_need_grad=weights_need_grad)
    assert wanted != "frozen" or not weights_need_grad, "the mode `frozen` makes no gradient of weights"
    return wanted, num_tokens if wanted == "cached" else 0


@dataclass(frozen=True)
class Job:
    """What is to be computed, beside the tensors."""

    dtype: torch.dtype
    """Of the logits."""
    transform: LogitTransform
    statistics: tuple[Statistic, ...]
    num_cached: int
    """How many tokens, the first ones, have their gradients kept (mode ``cached``)."""

    @property
    def wanted(self) -> tuple[float, float | None, frozenset[Statistic]]:
        """Arguments of the row functions."""
        return self.transform.factor, self.transform.cap, frozenset(self.statistics)

    def columns(self, parts: list[RowStats]) -> tuple[Tensor, ...]:
        """[N] log-probs, and each statistic in its order."""
        stats = concatenate(parts)
        return stats.logps, *(getattr(stats, name) for name in self.statistics)

    def outputs(self, ctx: Any, parts: list[RowStats]) -> tuple[Tensor, ...]:
        """The columns as an autograd function returns them: the statistics have no gradient."""
        columns = self.columns(parts)
        ctx.mark_non_differentiable(*columns[1:])
        return columns


def tile_stats(job: Job, targets: Tensor, products: Products) -> list[RowStats]:
    """Statistics of the tokens that are not cached, tile by tile; nothing else is kept."""
    row_stats = row_functions(targets.device.type).row_stats
    return [row_stats(logits, targets[tokens], *job.wanted) for tokens, logits in products.tiles(job.num_cached)]


class FrozenHead(torch.autograd.Function):
    """(x_1 .. x_k, W_1 .. W_k) -> the columns of a job, where no W needs a gradient; d logp / d x_i is kept."""

    @staticmethod
    def forward(ctx: Any, job: Job, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        products, parts = Products(tensors, job.dtype), []
        gradients = Gradients(products, ctx.needs_input_grad[2:])
        stats_and_gradients_ = row_functions(targets.device.type).stats_and_gradients_
        for tokens, logits in products.tiles(0):
            stats, scale = stats_and_gradients_(logits, targets[tokens], *job.wanted)
            gradients.add(tokens, logits, scale)
            parts.append(stats)
        ctx.save_for_backward(*gradients.of_inputs)
        return job.outputs(ctx, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        of_inputs = [None if rows is None else scaled(rows, upstream) for rows in ctx.saved_tensors]
        return None, None, *of_inputs, *(None for _ in of_inputs)


class TrainedHead(torch.autograd.Function):
    """(x_1 .. x_k, W_1 .. W_k) -> the columns of a job; d logp / d logits of the cached tokens is kept."""

    @staticmethod
    def forward(ctx: Any, job: Job, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        products, parts, cached = Products(tensors, job.dtype), [], slice(0, job.num_cached)
        gradients = scale = ctx.buffer = None
        if job.num_cached:
            ctx.buffer = products.buffer(job.num_cached)
            gradients = products.logits(cached, ctx.buffer)
            stats_and_gradients_ = row_functions(targets.device.type).stats_and_gradients_
            stats, scale = stats_and_gradients_(gradients, targets[cached], *job.wanted)
            parts.append(stats)
        parts += tile_stats(job, targets, products)
        lse = torch.cat([part.lse for part in parts])
        ctx.job = job
        ctx.save_for_backward(targets, lse, gradients, scale, *tensors)
        return job.outputs(ctx, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        targets, lse, cached_gradients, scale, *tensors = ctx.saved_tensors
        job: Job = ctx.job
        with torch.autocast(targets.device.type, enabled=False):
            products = Products(tensors, job.dtype)
            gradients = Gradients(products, ctx.needs_input_grad[2:])
            if job.num_cached:
                cached = slice(0, job.num_cached)
                gradients.add(cached, cached_gradients, scale * upstream[cached])
                ctx.buffer.give_back()
            logit_gradients_ = row_functions(targets.device.type).logit_gradients_
            for tokens, logits in products.tiles(job.num_cached):
                logit_gradients_(logits, lse[tokens], targets[tokens], upstream[tokens], *job.wanted[:2])
                gradients.add(tokens, logits)
        return None, None, *gradients.of_inputs, *gradients.of_weights


def refuse_second_derivative() -> None:
    """Raises: RuntimeError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradient of prefopt's head cannot be differentiated again: what it is made of is not kept. Call "
            "backward() and torch.autograd.grad() without create_graph=True."
        )
