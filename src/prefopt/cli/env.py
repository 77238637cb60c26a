"""``prefopt env``: what a bug report needs, and what this machine can do. Shows no environment variable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence

__all__ = ["describe", "main"]

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
OPTIONAL = ("peft", "bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "kernels", "trl")
GIB = 2**30


def main(argv: Sequence[str] = ()) -> int:
    """Prints the description; with a model's name as argument also the batch layouts the model can take."""
    if set(argv) & {"-h", "--help"}:
        print("usage: prefopt env [MODEL]\n\nVersions, devices, and what this machine (and the model) can do.")
        return 0
    for name, value in describe(argv[0] if argv else None):
        print(f"{name:<22}{value}")
    return 0


def describe(model: str | None = None) -> Iterator[tuple[str, str]]:
    """Pairs of a name and what there is to say."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    for package in OPTIONAL:
        yield package, _version(package)
    yield from _devices()
    yield "attention", ", ".join(_attention())
    yield "layouts", "shared_prompt, packed (models whose attention takes segments), padded (all models)"
    if model is not None:
        yield f"layouts of {model}", _layouts_of(model)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
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
            yield f"cuda:{index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB"
    else:
        yield accelerator.type, f"{torch.accelerator.device_count()} devices"
    yield "bf16", "on by default" if has_bf16_hardware() else "off by default (bf16=True uses it on the CPU)"
    yield "distributed", ", ".join(_process_groups()) or "none"


def _process_groups() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in found.items() if there]


def _attention() -> list[str]:
    """Implementations that ``attn_implementation`` takes here."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_flex_attn_available

    found = {
        "sdpa": True,
        "eager": True,
        "flex_attention": is_torch_flex_attn_available(),
        "flash_attention_2": is_flash_attn_2_available(),
    }
    return [name for name, there in found.items() if there]


def _layouts_of(model: str) -> str:
    """Decided from the config, on a model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefopt.scoring.capability import why_not_packed
    from prefopt.scoring.encoder_decoder import is_encoder_decoder

    config = AutoConfig.from_pretrained(model)
    if is_encoder_decoder(config):
        return "encoder_decoder (the only one of a model with two bodies)"
    with torch.device("meta"):
        reason = why_not_packed(AutoModelForCausalLM.from_config(config))
    return "shared_prompt, packed, padded" if reason is None else f"padded ({reason})"
