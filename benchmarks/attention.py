"""Attention over groups ``[prompt | chosen | rejected]``, forward and backward: backends and lengths.

    python benchmarks/attention.py
    python benchmarks/attention.py --lengths 200x300 800x170 --repeats 9

Beside the backends that the device has there are, on the same completions: ``dense mask``, one mask over the row;
``padded``, a row per completion; ``packed``, a plain causal sequence per completion by the backend that the run would
take. What is shared with the prompt is saved against ``packed``. On a CPU it is the processor's time, on a GPU that
between two synchronisations; sides alternate, medians are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from results import timed, write_result
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from workload import SHAPES, Shape, lengths

from prefopt.scoring.attention.backends import BACKENDS, VARIABLE, fault, obstacle
from prefopt.scoring.attention.options import LayerOptions, case_of
from prefopt.scoring.attention.plan import segment_mask
from prefopt.scoring.attention.registry import attend

Group = tuple[int, int, int]
Side = Callable[[], None]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available()
    shape = SHAPES["qwen3-0.6b" if on_gpu else "small"]
    device = "cuda" if on_gpu else "cpu"
    tokens = args.tokens or (16_384 if on_gpu else 2_048)
    kernels = usable(shape, device)
    table: dict[str, Any] = {}
    for name in args.lengths:
        prompt, completion = (int(number) for number in name.split("x"))
        groups = make_groups(prompt, completion, max(1, tokens // (prompt + 2 * completion)))
        seconds = medians(sides(groups, kernels, shape, device), args.repeats)
        table[name] = {"groups": groups, "seconds": seconds}
        print(f"{name}: {len(groups)} groups, {sum(map(sum, groups))} tokens")
        for side, value in sorted(seconds.items(), key=lambda item: item[1]):
            print(f"  {side:12} {1e3 * value:9.2f} ms  {value / seconds['packed']:.2f}x of packed", flush=True)
    heads = {"heads": shape.num_attention_heads, "kv_heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
    write_result("attention", {**heads, "dtype": "bfloat16" if on_gpu else "float32", "lengths": table})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=["1x450", "64x448", "200x300", "800x170", "2000x500"])
    parser.add_argument("--tokens", type=int, default=None, help="of a row, about; 2048 on a CPU, 16384 on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_groups(prompt: int, completion: int, count: int) -> list[Group]:
    """Lengths of prompt, chosen and rejected, a quarter around the mean."""
    means = (prompt, completion, completion)
    return [tuple(lengths(mean, 0.25, 3 * i + j) for j, mean in enumerate(means)) for i in range(count)]  # type: ignore[misc]


def sides(groups: list[Group], kernels: list[str], shape: Shape, device: str) -> dict[str, Side]:
    """What is compared, each as forward and backward of one layer's attention."""
    sequences = [prompt + own for prompt, *completions in groups for own in completions]
    row, packed = inputs(1, sum(map(sum, groups)), shape, device), inputs(1, sum(sequences), shape, device)
    padded = inputs(len(sequences), max(sequences), shape, device)
    shared, apart = carrier(shared_table(groups), device), carrier(packed_table(sequences), device)
    row_mask, padding_mask = dense_mask(groups, row[0]), padded_mask(sequences, padded[0])
    made = {
        "packed": step(packed, lambda *tensors: by_backend(*tensors, apart)),
        "dense mask": step(row, lambda *tensors: by_sdpa(*tensors, row_mask)),
        "padded": step(padded, lambda *tensors: by_sdpa(*tensors, padding_mask)),
        "segments": step(row, lambda *tensors: by_backend(*tensors, shared), backend="segments"),
    }
    for name in kernels:
        made[name] = step(row, lambda *tensors: by_backend(*tensors, shared), backend=name)
    return made


def usable(shape: Shape, device: str) -> list[str]:
    """The kernels that this device has."""
    case = case_of(*inputs(1, 1, shape, device), LayerOptions())
    reasons = {name: obstacle(name, case) or fault(name, case) for name in BACKENDS}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} is left out: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def inputs(rows: int, tokens: int, shape: Shape, device: str) -> list[Tensor]:
    """Query, key and value as a layer makes them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    return [
        torch.randn(rows, tokens, count, shape.head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in heads
    ]


def step(tensors: list[Tensor], attention: Callable[..., Tensor], backend: str = "") -> Side:
    gradient = torch.randn_like(tensors[0]).transpose(1, 2).contiguous()

    def run() -> None:
        with chosen(backend):
            torch.autograd.grad(attention(*tensors), tensors, gradient)

    return run


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def by_backend(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    return attend("sdpa", sdpa_attention_forward, module_of(query, key), query, key, value, segments, {})


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa_attention_forward(module_of(query, key), query, key, value, mask)[0]


def module_of(query: Tensor, key: Tensor) -> Any:
    """What transformers' function asks of a layer."""
    return SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)


def carrier(table: list[tuple[int, int, int, int]], device: str) -> Tensor:
    return torch.tensor(table, device=device).view(1, 1, -1, 4)


def shared_table(groups: list[Group]) -> list[tuple[int, int, int, int]]:
    table, start = [], 0
    for prompt, chosen, rejected in groups:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        table += [(start, middle, start, start), (middle, end, start, start + prompt)]
        start = end
    return table


def packed_table(sequences: list[int]) -> list[tuple[int, int, int, int]]:
    starts = [sum(sequences[:index]) for index in range(len(sequences))]
    return [(start, start + length, start, start) for start, length in zip(starts, sequences, strict=True)]


def dense_mask(groups: list[Group], like: Tensor) -> Tensor:
    """[1, 1, S, S] additive."""
    size = sum(map(sum, groups))
    mask = torch.full((1, 1, size, size), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    for start, end, prefix_start, prefix_end in shared_table(groups):
        mask[..., start:end, prefix_start:prefix_end] = 0
        mask[..., start:end, start:end] = segment_mask(end - start, 0, None, like)
    return mask


def padded_mask(sequences: list[int], like: Tensor) -> Tensor:
    """[rows, 1, T, T] additive: causal, and without the padding on the right."""
    width = max(sequences)
    mask = segment_mask(width, 0, None, like).repeat(len(sequences), 1, 1, 1)
    for row, length in enumerate(sequences):
        mask[row, :, :, length:] = torch.finfo(like.dtype).min
    return mask


def medians(sides: dict[str, Side], repeats: int) -> dict[str, float]:
    """Seconds of each side, after a warm-up."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(repeats + 2):
        for name, run in sides.items():
            seconds = timed(run, "cuda" if torch.cuda.is_available() else "cpu")
            if index >= 2:
                measured[name].append(seconds)
    return {name: statistics.median(values) for name, values in measured.items()}


if __name__ == "__main__":
    main()
