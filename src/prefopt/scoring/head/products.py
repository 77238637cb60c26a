"""The matrix products of the head: logits from inputs and weights, and the gradients of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prefopt.scoring.head.buffers import Buffer
from prefopt.scoring.head.plan import tile_rows, tiles

__all__ = ["Gradients", "Products", "scaled"]


class Products:
    """Logits of N tokens from inputs x_i [N, H_i] and weights W_i [V, H_i].

    Args:
        tensors: all x_i, then all W_i.
        dtype: to compute in; that of the inputs.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        count = len(tensors) // 2
        self.inputs, self.parameters = tensors[:count], tensors[count:]
        self.weights = [weight.to(dtype) for weight in self.parameters]
        self.num_tokens, self.vocab_size = len(self.inputs[0]), len(self.weights[0])
        self.dtype, self.device = dtype, self.inputs[0].device

    def buffer(self, num_tokens: int) -> Buffer:
        """Memory for the logits of ``num_tokens`` tokens."""
        return Buffer(num_tokens, self.vocab_size, self.dtype, self.device)

    def logits(self, tokens: slice, buffer: Buffer) -> Tensor:
        """[n, V] ``sum_i x_i @ W_i^T``, in the first rows of the buffer."""
        out = buffer.rows[: tokens.stop - tokens.start]
        torch.mm(self.inputs[0][tokens], self.weights[0].t(), out=out)
        for x, weight in zip(self.inputs[1:], self.weights[1:], strict=True):
            out.addmm_(x[tokens], weight.t())
        return out

    def tiles(self, start: int) -> Iterator[tuple[slice, Tensor]]:
        """The tokens from ``start`` on and their logits, a tile at a time, each in the memory of the one before."""
        rows = tile_rows(self.vocab_size * self.dtype.itemsize, self.device)
        buffer = self.buffer(min(rows, self.num_tokens - start))
        for tokens in tiles(start, self.num_tokens, rows):
            yield tokens, self.logits(tokens, buffer)
        buffer.give_back()


class Gradients:
    """Gradients of inputs and weights, summed up tile by tile.

    Args:
        products: what the gradients go through.
        wanted: for each input, then each weight, whether its gradient is made.
    """

    def __init__(self, products: Products, wanted: Sequence[bool]) -> None:
        count = len(products.inputs)
        self.products, self.wanted_weights = products, wanted[count:]
        pairs = zip(products.inputs, wanted[:count], strict=True)
        self.of_inputs = [torch.empty_like(x) if is_wanted else None for x, is_wanted in pairs]
        self.sums: list[Tensor | None] = [None] * count

    def add(self, tokens: slice, gradients: Tensor, scale: Tensor | None = None) -> None:
        """Take in ``diag(scale) gradients``, the gradient [n, V] with respect to the logits of ``tokens``."""
        is_all = tokens.stop - tokens.start == self.products.num_tokens
        for index, (x, weight) in enumerate(zip(self.products.inputs, self.products.weights, strict=True)):
            of_input = self.of_inputs[index]
            if of_input is not None:
                of_input[tokens] = scaled(gradients @ weight, scale)
            if self.wanted_weights[index]:
                self.sums[index] = add_product(self.sums[index], gradients, scaled(x[tokens], scale), is_all)

    @property
    def of_weights(self) -> list[Tensor | None]:
        """In the dtype of each parameter."""
        pairs = zip(self.sums, self.products.parameters, strict=True)
        return [None if total is None else total.to(parameter.dtype) for total, parameter in pairs]


def scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """``diag(scale) rows``, in the dtype of the rows."""
    return rows if scale is None else (rows * scale[:, None]).to(rows.dtype)


def add_product(total: Tensor | None, gradients: Tensor, x: Tensor, is_all: bool) -> Tensor:
    """``total + gradients^T x``, in float32: a sum of tiles that is rounded to half precision again and again drifts.

    A product that is all there is (``is_all``) is in the dtype of its factors; it is rounded once.
    """
    transposed = gradients.t()
    if is_all or gradients.dtype.itemsize > 2:
        return transposed @ x if total is None else total.addmm_(transposed, x)
    if total is None:
        total = torch.zeros(len(transposed), x.shape[1], dtype=torch.float32, device=x.device)
    if x.is_cuda and torch.version.hip is None:
        return torch.addmm(total, transposed, x, out_dtype=torch.float32, out=total)
    return total.addmm_(transposed.float(), x.float())
