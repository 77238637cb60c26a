"""Weights and optimizer states that FSDP2 divides among ranks: gathered for a checkpoint, divided again when read.

What is written is what one process writes, so that a run goes on with another number of ranks, or without FSDP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor

from prefopt.checkpoints.tensors import read_state, write_state

__all__ = [
    "OPTIMIZER",
    "load_sharded",
    "save_sharded",
    "taking_whole_weights",
    "use_whole_weights",
    "whole_state",
    "without_copies",
]

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
"""Name of the state of the optimizer in a checkpoint."""


def save_sharded(trainer: Any, folder: str | Path) -> None:
    """Write the state of the optimizer as that of one process; collective.

    The ranks that do not write keep nothing, so that one tensor at a time is whole on them.
    """
    state = whole_state(trainer.optimizer.state_dict(), keep=trainer.args.should_save)
    if trainer.args.should_save:
        write_state(state, folder, OPTIMIZER)


def load_sharded(trainer: Any, folder: str | Path) -> None:
    """Read the state of the optimizer, of which each rank keeps its part."""
    optimizer = trainer.optimizer
    state = read_state(folder, OPTIMIZER)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {
        index: {name: divided(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def whole_state(value: Any, *, keep: bool) -> Any:
    """A nested state whose tensors are whole and on the CPU; collective.

    Args:
        value: dicts, lists and tuples of anything.
        keep: whether this rank wants the tensors; else None stands in their places.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().cpu() if keep else None
    if isinstance(value, dict):
        return {name: whole_state(entry, keep=keep) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole_state(entry, keep=keep) for entry in value)
    return value


def divided(value: Any, like: Tensor) -> Any:
    """What has an entry for each one of a weight, divided as the weight is; anything else as it was.

    Args:
        value: whole on every rank.
        like: the weight.
    """
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    local = value.to(like.to_local().device)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent


@contextmanager
def taking_whole_weights(model: nn.Module) -> Iterator[None]:
    """Within, ``model.load_state_dict`` takes whole tensors for weights that are divided."""

    def divide(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        own: Mapping[str, Any] = module.state_dict()
        for name in state.keys() & own.keys():
            state[name] = divided(state[name], own[name])

    handle = model.register_load_state_dict_pre_hook(divide)
    try:
        yield
    finally:
        handle.remove()


def without_copies(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gathered state without the further names of tied weights, whose tensors are no longer the same ones."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(tied), name)) for name, tied in model.named_parameters(remove_duplicate=False))
    copies = {name for name, kept in names if name != kept and kept in state}
    return {name: tensor for name, tensor in state.items() if name not in copies}


def use_whole_weights(accelerator: Accelerator) -> None:
    """Weights are saved whole: ``from_pretrained`` reads them, and any number of ranks.

    Raises:
        ValueError: if the ranks share the model by FSDP's first version, whose states are of other weights.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP's first version joins weights into flat ones, whose optimizer state fits no other run. Set "
            "`fsdp_version: 2` in the accelerate config, or `fsdp_config={'version': 2}`."
        )
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        logger.info("fsdp_state_dict_type=%s: checkpoints hold whole weights all the same.", plugin.state_dict_type)
        plugin.set_state_dict_type(StateDictType.FULL_STATE_DICT)
