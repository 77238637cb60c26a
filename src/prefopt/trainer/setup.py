"""What a trainer is given, made ready: tokenizer and model."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from prefopt.scoring.encoder_decoder import is_encoder_decoder
from prefopt.scoring.forward import balancing_loss
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.saving.adapter_files import base_of_adapter, with_saved_adapter

__all__ = [
    "aux_weight",
    "check_kind",
    "check_output_dir",
    "disable_dropout",
    "has_two_bodies",
    "load_config",
    "load_model",
    "load_processing_class",
    "model_name",
]

logger = logging.getLogger(__name__)


def check_output_dir(folder: str) -> None:
    """Raises ValueError where a run could not write into ``folder``; it is not made yet."""
    path = Path(folder)
    above = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        kind = "a link to nothing" if above.is_symlink() else "a file"
        raise ValueError(f"output_dir={folder!r}: {str(above)!r} is {kind}, not a folder; name another one.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={folder!r}: {str(above)!r} may not be written to; name another folder.")


def model_name(model: Any) -> str:
    """What the model is called: its path, or the name or path it was loaded from ('' for one built in memory)."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def load_config(model: Any, args: PreferenceConfig) -> Any:
    """The transformers config of a model or of a name (of an adapter: its base model's); None where a name has none."""
    if not isinstance(model, str | os.PathLike):
        return getattr(model, "config", None)
    try:
        base = base_of_adapter(model, **hub_kwargs(args))
        if base is not None:
            return load_config(base[0], at_revision(args, base[1]))
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **hub_kwargs(args))
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
        try:
            given = load_by_name(name, args)
        except OSError as error:
            fix = f"Check the spelling, and the folder the command runs in ({str(error).partition(chr(10))[0]})."
            raise FileNotFoundError(f"{name}: no folder or Hub model of this name has a tokenizer. {fix}") from error
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
    if tokenizer.pad_token == tokenizer.eos_token:
        text = "The pad token is the EOS token (%s): harmless, padding is known by its place; every EOS is trained on."
        logger.info(text, tokenizer.eos_token)
    return given


def load_by_name(name: str, args: PreferenceConfig) -> Any:
    """The tokenizer or processor of a name; an adapter that comes without one has its base model's."""
    revision = {"revision": r} if (r := init_kwargs(args).get("revision")) else {}
    try:
        return load_tokenizer_or_processor(name, trust_remote_code=args.trust_remote_code, **revision)
    except (OSError, ValueError):
        base = base_of_adapter(name, **hub_kwargs(args))
        if base is None:
            raise
        return load_by_name(base[0], at_revision(args, base[1]))


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


def hub_kwargs(args: PreferenceConfig) -> dict[str, Any]:
    """Those of the user's options for ``from_pretrained`` that say where files are found."""
    return {key: value for key, value in init_kwargs(args).items() if key in ("revision", "token", "cache_dir")}


def at_revision(args: PreferenceConfig, revision: str | None) -> PreferenceConfig:
    """``args`` for the base model of an adapter: the user's ``revision`` is the adapter's."""
    args = copy.copy(args)
    kwargs = {key: value for key, value in init_kwargs(args).items() if key != "revision"}
    args.model_init_kwargs = {**kwargs, **({"revision": revision} if revision else {})}  # type: ignore[attr-defined]
    return args


def load_model(
    model: str | os.PathLike[str] | nn.Module, args: PreferenceConfig, quantization_config: Any = None
) -> PreTrainedModel | Any:
    """The model: an instance as it is, a name loaded with ``args.model_init_kwargs`` (float32 unless they say).

    The name of an adapter gives its base model with that adapter, which is trained further.

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
        return model
    if (base := base_of_adapter(model, **hub_kwargs(args))) is not None:
        loaded = load_model(base[0], at_revision(args, base[1]), quantization_config)
        return with_saved_adapter(loaded, model, **hub_kwargs(args))
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
    kind = AutoModelForSeq2SeqLM if has_two_bodies(config, args) else decoder_class(config)
    return kind.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)


def decoder_class(config: Any) -> Any:
    """What loads a decoder-only model with the head that predicts tokens, and the part that sees, if it has one."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def has_two_bodies(config: Any, args: PreferenceConfig) -> bool:
    """Whether the model is an encoder-decoder: its config says so, or where there is none yet, the option.

    Raises:
        ValueError: if the two contradict each other.
    """
    given = args.is_encoder_decoder
    if config is None:
        return bool(given)
    found = is_encoder_decoder(config)
    if given is not None and given != found:
        kind = "an encoder-decoder" if found else "a decoder-only model"
        raise ValueError(
            f"is_encoder_decoder={given}: the model ({config.model_type!r}) is {kind}; leave the option out, it is "
            "only needed with `model_init`."
        )
    return found


def check_kind(model: Any, role: str, *, encoder_decoder: bool) -> None:
    """Rows are made for one kind of model, before the model itself may be there; all models of a run are of that kind.

    Args:
        model: policy or reference.
        role: which of them, for the message.
        encoder_decoder: whether the rows are those of an encoder-decoder.

    Raises:
        ValueError: it is of the other kind.
    """
    kinds = ("decoder-only", "an encoder-decoder")
    found = is_encoder_decoder(model.config)
    if found != encoder_decoder:
        raise ValueError(
            f"The {role} ({model.config.model_type!r}) is {kinds[found]}, but the rows were prepared for a model that "
            f"is {kinds[encoder_decoder]}. A model of `model_init` needs is_encoder_decoder={found}; policy and "
            "reference must be of one kind, since they are given the same tokens."
        )


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
            budget of tokens, or have no gradient.
    """
    config = model.config.get_text_config()
    given = args.router_aux_loss_coef
    if is_encoder_decoder(model.config):
        if given:
            raise ValueError(
                f"router_aux_loss_coef={given}: the experts of encoder-decoder models ({type(model).__name__}) are "
                "trained without a load-balancing loss in this version; leave the option out."
            )
        return 0.0
    if not hasattr(config, "output_router_logits") or balancing_loss(model) is None:
        if given:
            raise ValueError(
                f"router_aux_loss_coef={given}: {type(model).__name__} is not a Mixture-of-Experts model with a "
                "load-balancing loss; leave the option out."
            )
        return 0.0
    weight = own_aux_weight(model) if given is None else given
    options: Any = args.gradient_checkpointing_kwargs
    if weight and (options or {}).get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True}: reentrant checkpointing differentiates what a "
            f"layer returns, and the load-balancing loss of {type(model).__name__} is made of what its routers leave "
            "aside: it would have no gradient. Leave use_reentrant out, or set router_aux_loss_coef=0."
        )
    if weight and args.tokens_per_batch is not None:
        raise ValueError(
            f"tokens_per_batch={args.tokens_per_batch}: the load-balancing loss of {type(model).__name__} is a "
            "function of the micro-batch, which a cut by tokens would change; set router_aux_loss_coef=0, or leave "
            "tokens_per_batch out."
        )
    return weight


def own_aux_weight(model: PreTrainedModel) -> float:
    """The weight that the model's config names, under the name it has there."""
    places, names = (model.config.get_text_config(), model), ("router_aux_loss_coef", "aux_loss_coef")
    weights = (getattr(place, name, None) for place in places for name in names)
    return float(next((weight for weight in weights if weight is not None), 0.0))
