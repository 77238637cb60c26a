"""Command-line options of the model and the data set, with TRL's names and defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.trainer.config_help import option

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

__all__ = ["ModelConfig", "ScriptArguments", "get_kbit_device_map", "get_peft_config", "get_quantization_config"]


@dataclass
class ModelConfig:
    """Which model, in which precision, with which adapter."""

    model_name_or_path: str | None = option("model_name_or_path", None)
    model_revision: str = option("model_revision", "main")
    dtype: str | None = option("dtype", "float32", choices=("auto", "bfloat16", "float16", "float32"))
    attn_implementation: str | None = option("attn_implementation", None)
    use_peft: bool = option("use_peft", False)
    lora_r: int = option("lora_r", 16)
    lora_alpha: int = option("lora_alpha", 32)
    lora_dropout: float = option("lora_dropout", 0.05)
    lora_target_modules: list[str] | None = option("lora_target_modules", None)
    lora_target_parameters: list[str] | None = option("lora_target_parameters", None)
    lora_modules_to_save: list[str] | None = option("lora_modules_to_save", None)
    lora_task_type: str = option("lora_task_type", "CAUSAL_LM")
    use_rslora: bool = option("use_rslora", False)
    use_dora: bool = option("use_dora", False)
    load_in_8bit: bool = option("load_in_8bit", False)
    load_in_4bit: bool = option("load_in_4bit", False)
    bnb_4bit_quant_type: str = option("bnb_4bit_quant_type", "nf4", choices=("fp4", "nf4"))
    use_bnb_nested_quant: bool = option("use_bnb_nested_quant", False)
    bnb_4bit_quant_storage: str | None = option("bnb_4bit_quant_storage", None)

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit=True and load_in_4bit=True: a model has one precision; set one of them")
        if self.use_peft and self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r}: an adapter's rank must be above 0: set for example 16")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]  # a name or a pattern


@dataclass
class ScriptArguments:
    """Which data set; a mixture (``datasets:`` in YAML) takes its place."""

    dataset_name: str | None = option("dataset_name", None)
    dataset_config: str | None = option("dataset_config", None)
    dataset_train_split: str = option("dataset_train_split", "train")
    dataset_test_split: str = option("dataset_test_split", "test")
    dataset_streaming: bool = option("dataset_streaming", False)
    ignore_bias_buffers: bool = option("ignore_bias_buffers", False)


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings that the options ask for, or None."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The LoRA settings that the options ask for, or None without ``use_peft``.

    Raises:
        ValueError: peft is not installed.
    """
    if not model_args.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("use_peft=True needs peft; install it with: pip install 'prefopt[peft]'") from error
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=_target_modules(model_args.lora_target_modules),
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        bias="none",
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def _target_modules(given: str | list[str] | None) -> str | list[str] | None:
    """PEFT reads text as a pattern for whole module paths, which the bare name of a module never matches."""
    if isinstance(given, str) and re.fullmatch(r"\w+", given):
        return [given]
    return given


def get_kbit_device_map() -> dict[str, int] | None:
    """A quantised model as a whole on this process's own device; None without one."""
    import torch
    from accelerate import PartialState

    if torch.cuda.is_available() or torch.xpu.is_available():
        return {"": PartialState().local_process_index}
    return None
