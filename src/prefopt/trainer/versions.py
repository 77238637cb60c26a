"""Differences between versions of transformers: one function each, with the version at which it can go."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

__all__ = [
    "CHECKPOINTING_NAMES",
    "chosen_checkpointing",
    "end_run",
    "own_optimizer_and_scheduler",
    "recomputing",
    "saving_here",
    "set_checkpointing",
    "stop_checkpointing",
    "unify_checkpointing",
]

CHECKPOINTING_NAMES = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
"""The name up to transformers 5.22, which is also prefopt's and TRL's, and the name from 5.23 on."""


def unify_checkpointing(config: Any, fresh: Collection[str]) -> list[str]:
    """Gives both names of activation checkpointing one value; returns the mistakes.

    transformers 5.23 renames ``gradient_checkpointing`` and warns whoever uses the old name. The name that this
    constructor call sets wins; where it sets neither, the new name's value holds if there is one (a copied config),
    else prefopt's default under the old name. Can go when transformers 5.22 is no longer supported and TRL's configs
    have the new name.
    """
    mistakes = []
    for old, new in CHECKPOINTING_NAMES:
        if not hasattr(config, new):
            continue
        before, now = getattr(config, old), getattr(config, new)
        if {old, new} <= {*fresh} and None not in (before, now) and before != now:
            mistakes.append(f"{old}={before!r} and {new}={now!r}: two names of one option; set only one of them")
        value = before if now is None or (old in fresh and new not in fresh) else now
        setattr(config, old, value)
        setattr(config, new, value)
    return mistakes


def checkpointing_names(config: Any) -> list[str]:
    """The names of the option that switches activation checkpointing, in this version."""
    return [name for name in CHECKPOINTING_NAMES[0] if hasattr(config, name)]


def chosen_checkpointing(config: Any) -> bool | None:
    """What the user chose for activation checkpointing, under either name; None where it was left open."""
    names = checkpointing_names(config)
    if not any(config.was_set(name) for name in names):
        return None
    assigned = [name for name in names if getattr(config, name) != config.user_set.as_made[name]]
    return bool(getattr(config, (assigned or names)[0]))


def set_checkpointing(config: Any, value: bool) -> None:
    """Writes the option under both names; `chosen_checkpointing` says what it said before."""
    if chosen_checkpointing(config) is None:
        config.decide(**dict.fromkeys(checkpointing_names(config), value))
    else:
        for name in checkpointing_names(config):
            setattr(config, name, value)


@contextmanager
def recomputing(model: Any, options: Any) -> Iterator[None]:
    """The layers of a transformers model recompute their activations, as training would make them.

    Args:
        model: bare. If it checkpoints already, it goes on as it is.
        options: ``gradient_checkpointing_kwargs``; which layers recompute, and where their inputs are kept meanwhile,
            decides no result and is left out.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    start = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    start({k: v for k, v in (options or {}).items() if k not in ("every_n_layers", "offload")} or None)
    try:
        yield
    finally:
        stop_checkpointing(model)


def stop_checkpointing(model: Any) -> None:
    """Undoes what transformers does for activation checkpointing. Can go when 5.22 is no longer supported."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


@contextmanager
def own_optimizer_and_scheduler(trainer: Any, num_training_steps: int) -> Iterator[None]:
    """Calls a subclass's ``create_optimizer_and_scheduler`` before what is done within makes either.

    The documents of transformers name it as the method to override, and tools that train in chunks do; from 5.0 on
    training passes it over. Can go when they call it again, or name it no more.

    Args:
        trainer: a ``Trainer`` whose optimizer is not made from a wrapped model.
        num_training_steps: of the run.
    """
    if type(trainer).create_optimizer_and_scheduler is Trainer.create_optimizer_and_scheduler:
        yield
        return
    if trainer._created_lr_scheduler:  # of an earlier call of `train`
        trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(num_training_steps=num_training_steps)
    trainer._created_lr_scheduler = False  # it would be taken for the one of an earlier call
    yield
    trainer._created_lr_scheduler = True


def end_run(trainer: Any) -> None:
    """Closes trackers and process groups. Can go with transformers 5.17, which lacks ``Trainer.end``."""
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while another saves takes its connections with it
    if hasattr(trainer, "end"):
        trainer.end()


@contextmanager
def saving_here(model: Any) -> Iterator[None]:
    """``model.save_pretrained`` writes wherever it is told that it is the main process.

    transformers 5 writes the weights on the first rank alone, so that with ``save_on_each_node`` the checkpoints of
    other nodes have none. Can go when that is mended.
    """
    if not hasattr(model, "should_save_on_this_rank"):
        yield
        return
    model.should_save_on_this_rank = bool
    try:
        yield
    finally:
        del model.should_save_on_this_rank
