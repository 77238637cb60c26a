"""What the tests of the Triton kernels run in processes of their own, because Triton reads TRITON_INTERPRET on import.

`python triton_cases.py cpu` runs the kernels in Triton's interpreter, given TRITON_INTERPRET=1, and prints as JSON how
far each case is from the definitions in float64; `cuda` does so on a GPU. `compile` makes their machine code, which
takes no GPU.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

ALL = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
TOTALS = ("entropy", "mean_logit", "log_sum_sq_prob")
"""Those that one NaN among the logits makes NaN."""
ASKED = ((), ALL[:3], ALL)
"""What training asks for: nothing, what the log shows, and that with WPO's."""


@dataclass(frozen=True)
class Case:
    num_rows: int
    vocab_size: int
    dtype: str = "float32"
    factor: float = 1.0
    cap: float | None = None
    statistics: tuple[str, ...] = ALL
    kind: str = "random"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        transform = f"{self.factor}-{self.cap}"
        return f"{self.kind}-{self.num_rows}x{self.vocab_size}-{self.dtype}-{transform}-{len(self.statistics)}"


def random(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V], targets [n] of which the first is the likeliest token, and a gradient [n] from above."""
    logits = 4 * torch.randn(case.num_rows, case.vocab_size)
    targets = torch.randint(0, case.vocab_size, (case.num_rows,))
    targets[:1] = logits[:1].argmax(-1)
    return logits, targets, torch.randn(case.num_rows)


def part(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors that are parts of others: rows with a gap between them, every other target, one number expanded."""
    logits, targets, _ = random(Case(2 * case.num_rows, case.vocab_size + 5))
    rows = logits.to(case.torch_dtype)[case.num_rows :, : case.vocab_size]
    return rows, targets.clamp(max=case.vocab_size - 1)[::2], torch.tensor(0.7).expand(case.num_rows)


def ties(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Many entries share the maximum; the targets are the first, the second and the last of them."""
    logits = torch.randint(0, 3, (case.num_rows, case.vocab_size)).float()
    at_top = [(row == row.max()).nonzero()[:, 0] for row in logits]
    return logits, torch.stack([at_top[i][(0, 1, -1)[i % 3]] for i in range(case.num_rows)]), torch.ones(case.num_rows)


def equal(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((case.num_rows, case.vocab_size), 3.0), torch.arange(case.num_rows), torch.ones(case.num_rows)


def far_up(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, scale = random(case)
    return logits + 1e4, targets, scale


def far_down(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, scale = random(case)
    return logits - 1e4, targets, scale


def far_apart(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of 1e4 among entries of -1e4."""
    logits, targets, scale = random(case)
    return torch.where(logits > 6, 1e4, -1e4), targets, scale


def rising(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Every block has a greater maximum than the one before, and the targets are the greatest."""
    logits, _, scale = random(case)
    logits += torch.linspace(0, 40, case.vocab_size)
    return logits, logits.to(case.torch_dtype).argmax(-1), scale


def masked(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of -inf: the whole first half and some of the rest; the last target is one of them."""
    logits, targets, scale = random(case)
    half = case.vocab_size // 2
    logits[logits < -2] = -torch.inf
    logits[:, :half] = -torch.inf
    logits[:, half] = 1.0
    targets[:] = half
    targets[-1] = 0
    return logits, targets, scale


def not_a_number(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, scale = random(case)
    logits[1:, case.vocab_size // 2] = torch.nan
    return logits, targets, scale


KINDS: dict[str, Callable[[Case], tuple[Tensor, Tensor, Tensor]]] = {
    kind.__name__: kind
    for kind in (random, part, ties, equal, far_up, far_down, far_apart, rising, masked, not_a_number)
}
CASES = [
    *(
        Case(3, vocab_size, dtype, factor, cap, statistics)
        for vocab_size in (1, 7, 128, 1000, 4099)
        for dtype, factor, cap, statistics in product(("float32", "bfloat16"), (1.0, 0.25), (None, 5.0), ASKED)
    ),
    *(Case(n, 128, dtype) for n in (0, 1, 64) for dtype in ("float32", "bfloat16", "float16")),
    *(
        Case(3, vocab_size, dtype, 2.0, cap, TOTALS if kind == "not_a_number" else ALL, kind)
        for kind in KINDS
        for vocab_size, dtype, cap in product((300, 9001), ("float32", "bfloat16"), (None, 30.0))
        if kind != "random"
    ),
]


def expected(case: Case, logits: Tensor, targets: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The definitions, in float64; the gradients by autograd."""
    raw = logits.double().requires_grad_()
    z = raw * case.factor
    if case.cap is not None:
        z = case.cap * torch.tanh(z / case.cap)
    lse = z.logsumexp(-1)
    target_logit = z.gather(-1, targets[:, None])[:, 0]
    (gradients,) = torch.autograd.grad(((target_logit - lse) * scale).sum(), raw)
    with torch.no_grad():
        p = (z - lse[:, None]).exp()
        return {
            "lse": lse.detach(),
            "target_logit": target_logit.detach(),
            "entropy": lse - torch.where(p > 0, p * z, 0.0).sum(-1),
            "mean_logit": z.mean(-1),
            "is_top1": z.argmax(-1) == targets,
            "log_sum_sq_prob": (2 * z).logsumexp(-1) - 2 * lse,
            "gradients": gradients,
        }


def differences(case: Case) -> dict[str, float]:
    """Name of what was computed -> its greatest difference from the definition."""
    from prefopt.scoring.head import triton_rows

    torch.manual_seed(case.vocab_size)
    logits, targets, scale = KINDS[case.kind](case)
    logits = logits.to(case.torch_dtype)
    want = expected(case, logits, targets, scale)
    whole = logits if logits._base is None else logits._base
    before = whole.clone()
    stats = triton_rows.row_stats(logits, targets, case.factor, case.cap, frozenset(case.statistics))
    found = {name: difference(value, want[name]) for name, value in vars(stats).items() if value is not None}
    found["written"] = difference(whole, before)
    gradients = triton_rows.logit_gradients_(logits, stats.lse, targets, scale, case.factor, case.cap)
    # One rounding to the logits' dtype is allowed, and the error of p that comes with the rounding of lse.
    rounding = torch.finfo(logits.dtype).eps * want["gradients"].abs()
    found["gradients"] = difference(logits, want["gradients"], rounding, want["lse"][:, None])
    before.as_strided(logits.shape, logits.stride(), logits.storage_offset()).copy_(gradients)
    found["written_beside"] = difference(whole, before)
    return found


def difference(found: Tensor, want: Tensor, rounding: Tensor | float = 0.0, size: Tensor | None = None) -> float:
    """The greatest difference beyond ``rounding``, in units of ``size`` (else of the value), at least 1. NaN is NaN."""
    found, want = found.double(), want.double()
    same = (found == want) | (found.isnan() & want.isnan())
    units = (want if size is None else size).abs().nan_to_num(1.0).clamp(1.0, 1e30)
    beyond = torch.where(same, 0.0, ((found - want).abs() - rounding) / units)
    return beyond.nan_to_num(torch.inf).clamp(min=0).amax().item() if beyond.numel() else 0.0


def code_sizes() -> dict[str, int]:
    """Kernel, with and without its options -> bytes of machine code for an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefopt.scoring.head import triton_rows

    types = {"logits": "*bf16", "targets": "*i64", "row_stride": "i32", "is_top1_out": "*i1"}
    all_of_it: dict[str, Any] = {"VOCAB_SIZE": 50257, "FACTOR": 0.5, "CAP": 30.0, "BLOCK": triton_rows.MAX_BLOCK}
    least = all_of_it | {"CAP": None} | {f"{name}_out": None for name in ALL}
    sizes = {}
    for kernel in (triton_rows.row_stats_kernel, triton_rows.logit_gradients_kernel):
        for options, constants in (("all", all_of_it), ("least", least)):
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
            source = ASTSource(kernel, signature, {n: value for n, value in constants.items() if n in signature})
            code = triton.compile(source, GPUTarget("cuda", 90, 32), triton_rows.LAUNCH)
            sizes[f"{kernel.__name__}-{options}"] = len(code.asm["cubin"])
    return sizes


def main(mode: str) -> None:
    warnings.simplefilter("ignore")  # NumPy's, of overflows in lanes beyond the vocabulary
    if mode == "compile":
        print(json.dumps(code_sizes()))
        return
    torch.set_default_device(mode)
    print(json.dumps({str(case): differences(case) for case in CASES}))


if __name__ == "__main__":
    main(sys.argv[1])
