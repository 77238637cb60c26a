"""The random number generators of a process: as a state for `prefopt.checkpoints.tensors`, and seeded anew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["rng_state", "seed_rng", "set_rng_state"]


def rng_state(device: torch.device, *, every_device: bool) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators.

    Args:
        device: that the process computes on.
        every_device: also of the others of its kind, where the backend can tell; else of the process's current one.
    """
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        backend: Any = torch.get_device_module(device)
        of_all = getattr(backend, "get_rng_state_all", None) if every_device else None
        state[device.type] = of_all() if of_all else [backend.get_rng_state()]
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue with what `rng_state` gave; a device that has gone meanwhile is left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    states = state.get(device.type, []) if device.type != "cpu" else []
    if not states:
        return
    backend: Any = torch.get_device_module(device)
    if len(states) == 1:
        backend.set_rng_state(states[0])
    for index, one in enumerate(states[: backend.device_count()] if len(states) > 1 else ()):
        backend.set_rng_state(one, index)


def seed_rng(seed: int, rank: int, step: int) -> None:
    """Seed all generators with a number that seed, rank and step decide, and that no two ranks or steps share."""
    number = int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
