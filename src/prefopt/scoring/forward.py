"""Scoring through the model's own forward, so that every wrapper around it stays in force.

DDP reduces gradients, FSDP gathers parameters and PEFT applies adapters only when the *wrapped module is called*.
Therefore `install` patches ``forward`` on the model instance: with our keyword argument it runs the body, takes the
rows that predict a completion token and calls the head on those alone; without it, it is the original forward.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.scoring.attention import attach_segments, is_segments, table_of
from prefopt.scoring.encoder_decoder import (
    decode,
    encoded,
    is_encoder_decoder,
    predicting_ids,
    share_projections,
    unite_embeddings,
)
from prefopt.scoring.head import token_stats
from prefopt.scoring.tokens import stats_of_logits
from prefopt.scoring.transforms import logit_transform
from prefopt.scoring.unsloth import body_outputs, is_unsloth
from prefopt.types import PreferenceBatch, Scores, Statistic

__all__ = ["balancing_loss", "evaluating", "innermost", "install", "score", "use_full_logits", "uses_full_logits"]


QUANTISED = "bitsandbytes."
"""The package of layers whose kernel in evaluation mode is another than in training mode."""


@dataclass(frozen=True)
class ScoreRequest:
    """What `score` asks of the patched forward."""

    predict_from: Tensor
    targets: Tensor
    row_length: int
    statistics: frozenset[Statistic]
    with_aux_loss: bool


def innermost(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, DDP and compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif type(model).__name__ == "PeftMixedModel":
            model = model.base_model.model  # type: ignore[assignment]
        elif not isinstance(model, PreTrainedModel) and hasattr(model, "module"):
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model  # type: ignore[return-value]


def install(model: nn.Module) -> None:
    """Teach the model to score; once is enough, and copies of the model know it too."""
    inner = innermost(model)
    # of a method, pickle keeps the name and not the function: a model that was pickled has its class's forward again
    unpickled = getattr(inner.forward, "__func__", None) is type(inner).forward
    if "_prefopt_forward" in vars(inner) and not unpickled:
        return
    original = inner.forward
    # A bound method in the instance is bound anew by deepcopy; a closure over `inner` would not be.
    inner._prefopt_forward = original  # type: ignore[assignment]

    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: Any, *args: Any, score_request: ScoreRequest | None = None, **kwargs: Any) -> Any:
        if score_request is None:
            return self._prefopt_forward(*args, **kwargs)
        return score_rows(self, score_request, *args, **kwargs)

    inner.forward = MethodType(forward, inner)
    for wrapper in model.modules():
        if vars(wrapper).get("forward") == original:  # PEFT's LLaMA adapters keep the forward that they find
            wrapper.forward = inner.forward
    if is_encoder_decoder(inner.config):
        unite_embeddings(inner)
        share_projections(inner)


def score(
    model: nn.Module,
    batch: PreferenceBatch,
    statistics: frozenset[Statistic] = frozenset(),
    *,
    with_aux_loss: bool = False,
) -> Scores:
    """The scores of a batch under a model on which `install` was called (or a wrapper of one).

    Args:
        model: the model, wrapped or not.
        batch: P pairs; its tensors on the model's device.
        statistics: token statistics wanted beyond the log-probs.
        with_aux_loss: also the load-balancing loss of a mixture of experts.
    """
    request = ScoreRequest(
        predict_from=batch.predict_from,
        targets=batch.targets,
        row_length=predicting_ids(batch.model_inputs).shape[1],
        statistics=statistics,
        with_aux_loss=with_aux_loss,
    )
    if batch.segments is not None:
        attach_segments(batch.model_inputs["attention_mask"], batch.segments)
    return model(**batch.model_inputs, use_cache=False, score_request=request)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; afterwards each module is in the mode it was in.

    Layers of bitsandbytes are left as they are: their mode decides how they round, not what they compute.
    """
    training: list[Any] = [m for m in model.modules() if m.training and not type(m).__module__.startswith(QUANTISED)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def use_full_logits(model: nn.Module) -> None:
    """Score this model from its own logits of every position: for a head that its config does not describe."""
    innermost(model)._prefopt_full_logits = True  # type: ignore[assignment]


def uses_full_logits(model: nn.Module) -> bool:
    """Whether `use_full_logits` was called on this model."""
    return getattr(innermost(model), "_prefopt_full_logits", False)


def score_rows(model: PreTrainedModel | Any, request: ScoreRequest, *args: Any, **kwargs: Any) -> Scores:
    """The patched forward: body, rows, head."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    labels = inputs.pop("labels", None)  # the completions of a batch for encoder-decoder models
    if labels is not None:
        inputs = encoded(model, labels, inputs)
    if request.with_aux_loss:
        inputs["output_router_logits"] = True
    if uses_full_logits(model):
        outputs: Any = model._prefopt_forward(*args, **inputs)  # type: ignore[operator]
        logits = outputs.logits.flatten(0, 1)[shifted(request, outputs.logits.shape[1])]
        return Scores(stats_of_logits(logits, request.targets, request.statistics), getattr(outputs, "aux_loss", None))
    if is_unsloth(model):
        body: Any = functools.partial(body_outputs, model._prefopt_forward)
    else:
        body = body_of(model) if labels is None else functools.partial(decode, model)
    outputs = body(*args, **inputs)
    hidden = outputs.last_hidden_state
    rows = hidden.flatten(0, 1).index_select(0, shifted(request, hidden.shape[1]).to(hidden.device))
    targets = request.targets.to(hidden.device)
    bias = getattr(model, "final_logits_bias", None)  # BART and its relatives
    bias = None if bias is None else bias.flatten()
    tokens = token_stats(head_of(model), rows, targets, logit_transform(model.config), request.statistics, bias)
    aux_loss = (
        aux_loss_of(model, outputs.router_logits, inputs.get("attention_mask")) if request.with_aux_loss else None
    )
    return Scores(tokens, aux_loss)


def shifted(request: ScoreRequest, row_length: int) -> Tensor:
    """``predict_from`` for rows that an adapter lengthened in front by virtual tokens (prompt tuning)."""
    virtual = row_length - request.row_length
    if not virtual:
        return request.predict_from
    row, place = request.predict_from // request.row_length, request.predict_from % request.row_length
    return row * row_length + virtual + place


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head; of an encoder-decoder the part in front of the head."""
    if is_encoder_decoder(model.config):
        return model.get_decoder()
    body = model.base_model
    if body is model:
        body = getattr(model, "model", model)
    if body is model:
        raise ValueError(
            f"{type(model).__name__} has no separate body: its `base_model_prefix` ({model.base_model_prefix!r}) names "
            "no attribute. prefopt scores models with a body and an output embedding; use a `...ForCausalLM` class."
        )
    return body


def head_of(model: PreTrainedModel) -> nn.Module:
    """The module that turns hidden states into logits (with an adapter on it, the adapter's module)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so it cannot predict tokens.")
    return head


def balancing_loss(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The load-balancing loss of a mixture of experts, from the model's own file; None where it has none."""
    files = (sys.modules[kind.__module__] for kind in type(model).__mro__)  # FSDP2 puts a class of its own in front
    return next((file.load_balancing_loss_func for file in files if hasattr(file, "load_balancing_loss_func")), None)


def aux_loss_of(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor | None:
    """The load-balancing loss, every token weighted as in a padded batch; None where the model routes nothing."""
    loss = balancing_loss(model)
    if loss is None or not router_logits:
        return None
    options = {
        "num_experts": option_of(model, "num_experts", "num_local_experts"),
        "top_k": option_of(model, "num_experts_per_tok"),
        "num_keys": math.isqrt(option_of(model, "num_experts", "num_local_experts")),  # doge's experts are a square
        "attention_mask": token_weights(attention_mask, router_logits),
    }
    wanted = inspect.signature(loss).parameters
    return loss(router_logits, **{name: value for name, value in options.items() if name in wanted})


def option_of(model: Any, *names: str) -> int:
    """A number that the model keeps under one of these names, or else its config."""
    places = (model, model.config.get_text_config())
    return next(value for place in places for name in names if (value := getattr(place, name, None)) is not None)


def token_weights(attention_mask: Tensor | None, router_logits: Any) -> Tensor | None:
    """How often a token counts: 0 for padding, and as often as a padded batch would hold it.

    An adapter's prefix is in the mask and is not routed.
    """
    if attention_mask is None:
        return None
    if is_segments(attention_mask):
        return token_multiplicity(attention_mask)
    return attention_mask[:, -(len(router_logits[0].flatten(0, -2)) // len(attention_mask)) :]


def token_multiplicity(segments: Any) -> Tensor:
    """[1, S] how many completions a token of a packed row serves: its own, and all that have it in their prefix."""
    table = table_of(segments)
    counts = torch.ones(1, table[-1][1], dtype=torch.int64)
    for _, _, prefix_start, prefix_end in table:
        counts[:, prefix_start:prefix_end] += 1
    return counts.to(segments.device)
