"""What a trainer is given, made ready: tokenizer, model, adapter."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)
from transformers.utils.import_utils import is_peft_available

from prefopt.scoring.forward import balancing_loss
from prefopt.trainer.config import PreferenceConfig

__all__ = [
    "aux_weight",
    "disable_dropout",
    "load_config",
    "load_model",
    "load_processing_class",
    "model_name",
    "wrap_with_adapter",
]

logger = logging.getLogger(__name__)


def model_name(model: Any) -> str:
    """What the model is called: its path, or the name or path it was loaded from ('' for one built in memory)."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def load_config(model: Any, args: PreferenceConfig) -> Any:
    """The transformers config of a model or of a name; None where a name has none (an adapter's folder)."""
    if not isinstance(model, str | os.PathLike):
        return getattr(model, "config", None)
    kwargs = {key: value for key, value in init_kwargs(args).items() if key in ("revision", "token", "cache_dir")}
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)
    except (OSError, ValueError):
        return None  # loading the model itself says what is wrong


def load_processing_class(given: Any, model: Any, args: PreferenceConfig) -> Any:
    """The tokenizer or processor: the one given, or the one of the model's name; with a pad token.

    Raises:
        TypeError: if it is neither a tokenizer nor a processor.
        ValueError: if none was given and the model has no name to load it by, or if ``pad_token`` is unknown to it.
    """
    if given is None:
        name = model_name(model)
        if not name:
            raise ValueError(
                "The model was built in memory and has no name to load a tokenizer by; pass `processing_class`."
            )
        revision = {"revision": r} if (r := init_kwargs(args).get("revision")) else {}
        given = load_tokenizer_or_processor(name, trust_remote_code=args.trust_remote_code, **revision)
    if not isinstance(given, PreTrainedTokenizerBase | ProcessorMixin):
        raise TypeError(
            "The `processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`, "
            f"not {type(given).__name__}."
        )
    tokenizer: Any = getattr(given, "tokenizer", given)
    pad_token = getattr(args, "pad_token", None)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token={pad_token!r}: not found in the vocabulary of the {type(tokenizer).__name__}; choose one "
                "of its tokens, or leave it out to use the tokenizer's own."
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return given


def load_tokenizer_or_processor(name: str, **kwargs: Any) -> Any:
    """A processor where the model has one, else a tokenizer."""
    try:
        loaded = AutoProcessor.from_pretrained(name, **kwargs)
    except (OSError, ValueError, ImportError):
        return AutoTokenizer.from_pretrained(name, **kwargs)
    if isinstance(loaded, PreTrainedTokenizerBase | ProcessorMixin):
        return loaded
    return AutoTokenizer.from_pretrained(name, **kwargs)


def init_kwargs(args: PreferenceConfig) -> dict[str, Any]:
    return dict(getattr(args, "model_init_kwargs", None) or {})


def load_model(
    model: str | os.PathLike[str] | nn.Module, args: PreferenceConfig, quantization_config: Any = None
) -> PreTrainedModel | Any:
    """The model: an instance as it is, a name loaded with ``args.model_init_kwargs`` (float32 unless they say).

    Raises:
        ValueError: if options contradict the model, or it is of a kind that is not supported.
    """
    kwargs = init_kwargs(args)
    if not isinstance(model, str | os.PathLike):
        if quantization_config is not None:
            raise ValueError(
                "`quantization_config` was given with a model that is already instantiated; it takes effect only while "
                "loading: pass the model's name, or load the model with it."
            )
        if kwargs:
            logger.warning(
                "`model_init_kwargs` was given with a model that is already instantiated; it is ignored. Pass them to "
                "`from_pretrained`."
            )
        refuse_unsupported(model.config)
        return model
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` was given as an argument and in `model_init_kwargs`; give it in only one place."
            )
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("dtype", "float32")
    if torch.cuda.is_available() and args.world_size == 1:
        kwargs.setdefault("device_map", "auto")
    config = load_config(model, args)
    if config is not None:
        refuse_unsupported(config)
    return AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)


def refuse_unsupported(config: Any) -> None:
    """Model kinds that this version does not train."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; this version trains decoder-only language models."
        )


def wrap_with_adapter(model: Any, peft_config: Any, args: PreferenceConfig) -> Any:
    """The model with a new adapter of ``peft_config``; adapters it has already stay active and are not trained.

    Raises:
        ImportError: without peft.
        TypeError: if ``peft_config`` is no ``peft.PeftConfig``.
        ValueError: if the new adapter cannot act together with those the model has.
    """
    if not is_peft_available():
        raise ImportError("`peft_config` needs the package peft: pip install 'prefopt[peft]'.")
    from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, not {type(peft_config).__name__}.")
    if isinstance(model, PeftModel):
        return stacked_adapter(model, peft_config)
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs or {},
        )
    set_seed(args.seed)  # the adapter's random weights depend on the seed alone, not on what ran before
    with warnings.catch_warnings():  # peft 0.21 asks for checkpointing by the name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return get_peft_model(model, peft_config)


def stacked_adapter(model: Any, peft_config: Any) -> Any:
    """A PeftModel with one more adapter, the only one that is trained, acting together with those that were active."""
    kinds = {config.peft_type for config in model.peft_config.values()} | {peft_config.peft_type}
    if peft_config.is_prompt_learning or len(kinds) > 1:
        raise ValueError(
            f"The model has adapters already, and one of type {peft_config.peft_type.value} cannot act together with "
            f"them (types: {', '.join(sorted(kind.value for kind in kinds))}). Call `merge_and_unload()` on the model "
            "first, or leave `peft_config` out to train its own adapter."
        )
    before = list(model.active_adapters)
    name = "preference"
    while name in model.peft_config:
        name += "_"
    model.add_adapter(name, peft_config)
    model.base_model.set_adapter([*before, name])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the model to 0: of ``nn.Dropout``, and those that modules keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # attention_dropout, resid_pdrop, layerdrop, ...
                setattr(module, name, 0.0)


def aux_weight(model: PreTrainedModel, args: PreferenceConfig) -> float:
    """Weight of the mixture-of-experts load-balancing loss: the option's, else the model's own; 0 for dense models.

    Raises:
        ValueError: ``router_aux_loss_coef`` was set for a model that has no experts, or the loss would depend on a
            budget of tokens.
    """
    config = model.config.get_text_config()
    given = args.router_aux_loss_coef
    if not hasattr(config, "output_router_logits") or balancing_loss(model) is None:
        if given:
            raise ValueError(
                f"router_aux_loss_coef={given}: {type(model).__name__} is not a Mixture-of-Experts model with a "
                "load-balancing loss; leave the option out."
            )
        return 0.0
    weight = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if given is None else given
    if weight and args.tokens_per_batch is not None:
        raise ValueError(
            f"tokens_per_batch={args.tokens_per_batch}: the load-balancing loss of {type(model).__name__} is a "
            "function of the micro-batch, which a cut by tokens would change; set router_aux_loss_coef=0, or leave "
            "tokens_per_batch out."
        )
    return weight
