"""Models that Unsloth has loaded: their forward is Unsloth's own, and must be asked in its own way.

It makes the causal mask itself, for kernels that are given none by anybody else, and hands it to the body. So the body
is not called from here, as for other models: the whole forward is, and told by an environment variable to return hidden
states in place of logits. Labels are never passed, with which it returns a loss and no logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["VARIABLE", "WHY_PADDED", "body_outputs", "is_unsloth"]

VARIABLE = "UNSLOTH_RETURN_HIDDEN_STATES"
"""The environment variable, read in every forward pass."""
WHY_PADDED = "Unsloth puts a causal mask of its own in place of any other"


def is_unsloth(model: nn.Module) -> bool:
    """Whether Unsloth has loaded this model (and not only trained the weights that it has)."""
    return callable(getattr(model, "for_training", None)) and callable(getattr(model, "for_inference", None))


@contextmanager
def hidden_states_returned() -> Iterator[None]:
    """The models of Unsloth return hidden states as their ``logits``; afterwards what they returned before."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def body_outputs(forward: Any, *args: Any, **inputs: Any) -> Any:
    """What the body of a model would return: its outputs, with ``last_hidden_state``.

    Args:
        forward: the model's own.
        args, inputs: its arguments.
    """
    with hidden_states_returned():
        outputs = forward(*args, **inputs)
    outputs.last_hidden_state = outputs.logits
    return outputs
