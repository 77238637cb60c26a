"""The head, forward and backward: prefopt's modes, full logits, and TRL 1.16's chunked log-probs.

    python benchmarks/head.py
    python benchmarks/head.py --shape qwen3-0.6b --rows 1024 --repeats 9

Three cases: the head is trained; it is frozen and the hidden states are not (LoRA); nothing needs a gradient (the
reference). In the first two prefopt and TRL also make what a log shows (entropy, mean logit, top-1); full logits are
spared that. Time is the processor's on a CPU, and between two synchronisations on a GPU; sides alternate, medians are
shown. The share is that of the matrix products a case cannot do without in the time they take alone.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from results import timed, write_result
from side import peak_memory, reset_peak
from torch import Tensor
from workload import SHAPES

from prefopt.metrics import LOGGED_STATISTICS
from prefopt.scoring.head import buffers
from prefopt.scoring.head.factors import Factors
from prefopt.scoring.head.function import factored_stats
from prefopt.scoring.transforms import LogitTransform

Logps = Callable[[], Tensor]
CASES = {"trained": 3, "frozen": 2, "no gradient": 1}
"""Case -> matrix products of head and rows that it cannot do without."""
TRL_OUTPUTS = ("entropy", "mean_logits", "is_top1")
TRL_CHUNK = 32_768
"""Its trainers' width of a tile."""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    tensors = Tensors.random(args)
    product = matrix_product(tensors)
    result: dict[str, Any] = {"shape": tensors.describe(), "threads": args.threads, "cases": {}}
    for case, units in CASES.items():
        seconds, rates, peaks = measure(tensors, case, product, args.repeats)
        print(f"{case}, {tensors.describe()}")
        rows = {}
        for side, median in sorted(seconds.items(), key=lambda item: item[1]):
            share = units * rates / median
            rows[side] = {"seconds": median, "share_of_matrix_rate": share, "peak_bytes": peaks[side]}
            ratio = median / seconds["trl"]
            print(f"  {side:18} {1e3 * median:9.2f} ms {ratio:6.2f}x of TRL  share {share:.2f}", end="")
            print(f"  peak {peaks[side] / 2**20:8.0f} MiB", flush=True)
        result["cases"][case] = {"product_seconds": rates, "sides": rows}
    write_result("head", result)


def arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b" if on_gpu else "small")
    parser.add_argument("--rows", type=int, default=12_288 if on_gpu else 2_500, help="completion tokens")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


@dataclass(frozen=True)
class Tensors:
    """What every side is given."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor

    @classmethod
    def random(cls, args: argparse.Namespace) -> Tensors:
        torch.manual_seed(0)
        shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
        hidden = torch.randn(args.rows, shape.hidden_size, device=args.device, dtype=dtype)
        weight = 0.05 * torch.randn(shape.vocab_size, shape.hidden_size, device=args.device, dtype=dtype)
        targets = torch.randint(0, shape.vocab_size, (args.rows,), device=args.device)
        upstream = torch.randn(args.rows, device=args.device) / args.rows
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, upstream)

    def describe(self) -> dict[str, Any]:
        (rows, hidden_size), vocab_size = self.hidden.shape, len(self.weight)
        return {
            "rows": rows,
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "dtype": str(self.hidden.dtype).removeprefix("torch."),
            "device": self.hidden.device.type,
        }


def sides(tensors: Tensors, case: str) -> dict[str, Logps]:
    """The log-probs of a case, by name of the side."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets, outputs = tensors.targets, () if case == "no gradient" else TRL_OUTPUTS
    wanted = frozenset() if case == "no gradient" else LOGGED_STATISTICS
    hidden, weight = tensors.hidden, tensors.weight if case == "trained" else tensors.weight.detach()

    def prefopt(mode: Any) -> Logps:
        return lambda: factored_stats(Factors((hidden,), (weight,)), targets, LogitTransform(), wanted, mode).logps

    def full() -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def trl() -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, outputs)[0]

    modes = {"trained": ("cached", "recompute"), "frozen": ("frozen",), "no gradient": (None,)}[case]
    ours = {f"prefopt {mode}" if mode else "prefopt": prefopt(mode) for mode in modes}
    return {**ours, "full logits": full, "trl": trl}


def matrix_product(tensors: Tensors) -> Callable[[], None]:
    """One product of rows and head, into memory that is there."""
    hidden, weight = tensors.hidden.detach(), tensors.weight.detach()
    out = hidden.new_empty(len(hidden), len(weight))

    def run() -> None:
        torch.mm(hidden, weight.T, out=out)

    return run


def measure(
    tensors: Tensors, case: str, product: Callable[[], None], repeats: int
) -> tuple[dict[str, float], float, dict[str, int]]:
    """Median seconds of each side and of one matrix product, and the peak of memory of each side."""
    runs = {name: step(tensors, logps, case != "no gradient") for name, logps in sides(tensors, case).items()}
    peaks = {name: peak(run, tensors.hidden.device.type) for name, run in runs.items()}
    measured: dict[str, list[float]] = {name: [] for name in (*runs, "product")}
    for _ in range(repeats + 1):
        for name, run in {**runs, "product": product}.items():
            measured[name].append(timed(run, tensors.hidden.device.type))
    medians = {name: statistics.median(values[1:]) for name, values in measured.items()}
    return medians, medians.pop("product"), peaks


def step(tensors: Tensors, logps: Logps, with_gradient: bool) -> Callable[[], None]:
    def run() -> None:
        if with_gradient:
            logps().backward(tensors.upstream)
            tensors.hidden.grad = tensors.weight.grad = None
        else:
            with torch.no_grad():
                logps()

    return run


def peak(run: Callable[[], None], device: str) -> int:
    """Bytes that a side takes above what is there before it, buffers that it keeps for the next step among them."""
    buffers.free.clear()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what an earlier side freed is not free memory yet
    held = reset_peak(device)
    run()
    return peak_memory(device) - held


if __name__ == "__main__":
    main()
