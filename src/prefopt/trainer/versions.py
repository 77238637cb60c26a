"""Differences between versions of transformers: one function each, with the version at which it can go."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["CHECKPOINTING_NAMES", "end_run", "unify_checkpointing"]

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


def end_run(trainer: Any) -> None:
    """Closes trackers and process groups. Can go with transformers 5.17, which lacks ``Trainer.end``."""
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while another saves takes its connections with it
    if hasattr(trainer, "end"):
        trainer.end()
