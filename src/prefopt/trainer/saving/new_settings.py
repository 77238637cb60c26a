"""After a change that was allowed: what a checkpoint brings of optimizer and schedule gives way to the new options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

__all__ = ["begin_schedule", "has_new_schedule", "needs_new_optimizer", "new_settings_acting"]

OF_A_GROUP = ("weight_decay", "betas", "eps", "momentum", "alpha")
"""Settings of an optimizer that its state holds beside what it has learnt."""
OTHER_OPTIMIZER = ("optim", "optim_target_modules", "optimizer: kind")
OTHER_SCHEDULE = ("lr_scheduler_type", "scheduler")


def needs_new_optimizer(changes: Mapping[str, Any]) -> bool:
    """Whether what the checkpoint's optimizer has learnt is of no use to the run's."""
    return any(name in changes for name in OTHER_OPTIMIZER)


def has_new_schedule(changes: Mapping[str, Any]) -> bool:
    """Whether the learning rate follows another schedule than the checkpoint's run."""
    return any(name in changes for name in OTHER_SCHEDULE)


def begin_schedule(scheduler: Any, state: Path) -> None:
    """A schedule whose state the checkpoint's is not: as it is at that step, or new where it is no function of it.

    Args:
        scheduler: made for this run.
        state: the file with the checkpoint's step.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = TrainerState.load_from_json(str(state)).global_step
        scheduler._step_count = scheduler.last_epoch + 1


@contextmanager
def new_settings_acting(optimizer: Any, scheduler: Any, changes: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """Around the reading of both states; without changes they are left exactly as they were read.

    Args:
        optimizer: made for this run.
        scheduler: likewise.
        changes: what differs from the checkpoint's run -> as it was, as it is.
    """
    made = optimizer.param_groups
    settings = [{name: group[name] for name in OF_A_GROUP if name in group} for group in made]
    rates = [group.get("initial_lr", group["lr"]) for group in made]
    yield
    if not changes:
        return
    was, now = changes.get("learning_rate", (1.0, 1.0))
    groups = optimizer.param_groups  # reading a state puts others in their place
    for number, (group, own, rate) in enumerate(zip(groups, settings, rates, strict=True)):
        group.update(own)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs[number] = group["initial_lr"] = rate
            group["lr"] = rate * scheduler.lr_lambdas[number](scheduler.last_epoch)
        elif has_new_schedule(changes):
            group["lr"] = rate
        elif was:
            group["lr"] *= now / was
    scheduler._last_lr = [group["lr"] for group in groups]
