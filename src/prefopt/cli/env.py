"""``prefopt env``: what a bug report needs, what a run gets on this machine, and why. Shows no environment variable.

What is said of a run comes from the functions that decide it in a run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["describe", "main", "rows_attention"]

USAGE = """\
usage: prefopt env [MODEL]

Versions, devices, and what a run gets on this machine: precision, attention and
head kernels, optimizer, packages. With MODEL (a folder or a Hub name; its
weights are not loaded) also: layout, attention, context, chat template, size.
"""
PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
)
OPTIONAL = {
    "peft": "use_peft: LoRA and other adapters; pip install 'prefopt[peft]'",
    "bitsandbytes": "load_in_4bit, load_in_8bit, optimizers in 8 bits",
    "triton": "the head's kernel on CUDA; without it torch computes the same",
    "flash-attn": "attention with soft caps or dropout on CUDA; without it FlexAttention, or segment by segment",
    "liger-kernel": "use_liger_kernel: layer kernels on CUDA",
    "kernels": "kernels from the Hub (use_kernels, attn_implementation)",
    "deepspeed": "accelerate_config zero1, zero2, zero3",
    "pillow": "images",
    "ray": "sweeps on several machines (--engine ray); pip install 'prefopt[ray]'",
    "optuna": "pruning in sweeps, hyperparameter_search; pip install 'prefopt[sweep]'",
    "tensorboard": "report_to tensorboard",
    "trackio": "report_to trackio",
    "wandb": "report_to wandb",
    "mlflow": "report_to mlflow",
    "trl": "tests that compare with it",
}
"""Package -> what it switches on."""
GIB = 2**30
KINDS = {"plain": {}, "window": {"windowed": True}, "soft cap": {"softcap": 50.0}, "sinks": {"sinks": True}}
"""What layers may ask of their attention."""


def main(argv: Sequence[str] = ()) -> int:
    """Prints the description; with a model's name as argument also what the model gets.

    Raises:
        UserError: there is no such model, or there are other arguments.
    """
    if set(argv) & {"-h", "--help"}:
        print(USAGE, end="")
        return 0
    if wrong := [text for text in argv if text.startswith("-")] or argv[1:]:
        raise UserError(f"unexpected argument {wrong[0]!r}: the name of a model, or nothing; see prefopt env --help")
    from prefopt.terminal import harmless

    for name, value in describe(argv[0] if argv else None):
        print(harmless(f"{name:<22}{value}"))
    return 0


def describe(model: str | None = None) -> Iterator[tuple[str, str]]:
    """Pairs of a name and what there is to say."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, version_of(package) or "not installed"
    for package, purpose in OPTIONAL.items():
        yield package, version_of(package) or f"not installed ({purpose})"
    yield from devices()
    yield from kernels()
    yield "layouts", "shared_prompt, packed (models whose attention takes segments), padded (all models)"
    if model is not None:
        from prefopt.cli.env_model import model_lines

        yield from model_lines(model)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[tuple[str, str]]:
    import torch

    from prefopt.trainer.precision import has_bf16_hardware

    yield (
        "cpu",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        yield "accelerator", "none: training runs on the CPU"
    elif accelerator.type == "cuda":
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            yield f"cuda:{index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {capability}"
    else:
        yield accelerator.type, f"{torch.accelerator.device_count()} devices"
    yield "bf16", "on by default" if has_bf16_hardware() else "off by default (bf16=True uses it on the CPU)"
    yield "distributed", ", ".join(process_groups()) or "none"


def process_groups() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in found.items() if there]


def kernels() -> Iterator[tuple[str, str]]:
    """What computes attention, head and optimizer where a run would be."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    yield "attention", ", ".join(implementations())
    yield "attention of rows", rows_attention(device, KINDS)
    yield "head", head_kernel(device.type)
    yield "optimizer", optimizer_on(device)


def implementations() -> list[str]:
    """Implementations that ``attn_implementation`` takes here."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_flex_attn_available

    found = {
        "sdpa": True,
        "eager": True,
        "flex_attention": is_torch_flex_attn_available(),
        "flash_attention_2": is_flash_attn_2_available(),
    }
    return [name for name, there in found.items() if there]


def rows_attention(device: torch.device, kinds: Iterable[str], **sizes: Any) -> str:
    """Which backend computes packed rows, for each kind of attention; on CUDA each has a trial, as in a run.

    Args:
        device: where.
        kinds: of `KINDS`.
        sizes: heads, kv_heads and head_dim of a model.
    """
    import torch

    from prefopt.scoring.attention.backends import BACKENDS, backend_for, obstacle
    from prefopt.scoring.attention.options import Case
    from prefopt.trainer.precision import has_bf16_hardware

    dtype = torch.bfloat16 if has_bf16_hardware() else torch.float32
    shape = {"heads": 8, "kv_heads": 8, "head_dim": 64, **sizes}
    plain: dict[str, Any] = {"windowed": False, "softcap": None, "sinks": False}
    chosen: dict[str, str] = {}
    for kind in kinds:
        layer = {**plain, **KINDS[kind]}
        case = Case(device, dtype, value_dim=shape["head_dim"], scale=None, dropout=0.0, unknown=(), **shape, **layer)
        backend = backend_for("sdpa", case)
        names = [name for name, known in BACKENDS.items() if known is backend]
        reasons: dict[str, list[str]] = {}
        for backend_name in BACKENDS:
            reasons.setdefault(obstacle(backend_name, case) or "its trial failed", []).append(backend_name)
        why = "; ".join(f"{', '.join(found)}: {reason}" for reason, found in reasons.items())
        chosen[kind] = names[0] if names else f"segment by segment, by the model's own attention ({why})"
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{kind}: {name}" for kind, name in chosen.items())


def head_kernel(device_type: str) -> str:
    """What computes log-probs from logits."""
    from prefopt.scoring.head.rows import row_functions

    function = row_functions(device_type).row_stats
    module = getattr(function, "func", function).__module__.rpartition(".")[2]
    return {"triton_rows": "Triton, tile by tile", "torch_rows": f"torch, tile by tile ({device_type})"}[module]


def optimizer_on(device: torch.device) -> str:
    """The default optimizer, and whether its fused form runs here: it is tried."""
    import torch
    from transformers import TrainingArguments

    name = TrainingArguments.default_optim
    weight = torch.zeros(1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except RuntimeError as error:
        return f"{name} by default; fused AdamW does not run on {device.type} ({error}): set optim to adamw_torch"
    return f"{name} by default; fused AdamW runs on {device.type}"
