"""A resumed run is the run it continues: what differs is shown, and refused where it would give other numbers.

Every checkpoint holds what decides the numbers of its run: the options, facts of model, reference and data
(`run_facts`), and a hash of every row. They are taken when the run begins, before anything of it moves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from prefopt.checkpoints.tensors import has_state, read_state, write_state
from prefopt.files import write_file
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.installed import versions
from prefopt.trainer.saving.changes import Change, changed_options, depends_on_total
from prefopt.trainer.saving.facts import flat, row_hashes, run_facts
from prefopt.trainer.saving.foreign import begin_from_foreign, foreign_checkpoint, load_foreign_weights
from prefopt.trainer.saving.masking import without_secrets
from prefopt.trainer.saving.new_settings import needs_new_optimizer
from prefopt.trainer.saving.row_changes import row_difference

__all__ = [
    "Beginning",
    "ResumeError",
    "begun",
    "check_continuation",
    "foreign_checkpoint",
    "load_foreign_weights",
    "write_arguments",
    "write_continuation",
]

logger = logging.getLogger(__name__)

OF_NUMBERS = ("prefopt", "torch", "transformers", "peft")
"""Packages that compute, or know the configs: other versions are said, never refused."""
ARGUMENTS_FILE = "training_args.json"
STATE = "continuation"
"""The name of the state in a checkpoint, `write_state`."""
WIDTH = 60
"""Characters of a value in the table."""
FINGERPRINTS = ("model: weights that are not trained", "reference: weights")
"""Places of facts that are not known where weights are divided."""
ABSENT = "-"
"""In the table, of what only the other run has."""
PROCESSING, DATA = "processing: ", "data: "
"""What the places of facts begin with that act through the rows, and that are about them."""


class ResumeError(ValueError):
    """A run cannot go on from what was asked for; the message says what there is to do."""


Difference = tuple[str, Any, Any]
"""What, as it was, as it is."""


@dataclass(frozen=True)
class Beginning:
    """What a run began with."""

    options: dict[str, Any]
    """`arguments`."""
    facts: dict[str, Any]
    """Place -> value, `flat` of `run_facts`."""
    rows: NDArray[np.uint64]
    """`row_hashes`."""


# -- options -----------------------------------------------------------------------------------------------------


def write_arguments(args: PreferenceConfig, folder: str | Path) -> None:
    """Write every option of a run as JSON, without secrets."""
    write_file(Path(folder, ARGUMENTS_FILE), json.dumps(arguments(args), indent=1))


def arguments(args: PreferenceConfig) -> dict[str, Any]:
    """The options as JSON has them, so that those of two runs compare."""
    return without_secrets(json.loads(json.dumps(args.to_dict(), default=str)))


# -- a run's beginning -------------------------------------------------------------------------------------------


@contextmanager
def begun(trainer: Any) -> Iterator[None]:
    """A run, from after its model was made until it ends: checkpoints of it know what it began with."""
    begin_from_foreign(trainer)
    if trainer.args.should_save and trainer.beginning is None:  # `check_continuation` may have made it
        trainer.beginning = beginning(trainer)
    try:
        yield
    finally:
        trainer.beginning = None


def beginning(trainer: Any) -> Beginning:
    return Beginning(arguments(trainer.args), flat(run_facts(trainer)), row_hashes(trainer.train_dataset))


def write_continuation(trainer: Any, folder: str | Path) -> None:
    """Write into a checkpoint what its run began with."""
    if not trainer.args.should_save:
        return
    began = trainer.beginning or beginning(trainer)
    state = {"options": began.options, "facts": began.facts, "rows": began.rows, "versions": versions(OF_NUMBERS)}
    write_state(state, folder, STATE)


def check_continuation(trainer: Any, folder: str | Path) -> None:
    """Hold this run against the one that a checkpoint is of; collective.

    With ``allow_changes`` what differs is a warning, and the new values act.

    Raises:
        ResumeError: numbers would be others from here on; with a table of what differs.
    """
    found: list[Any] = [([], [], [])]
    if trainer.is_world_process_zero() and has_state(folder, STATE):
        found = [compared(trainer, read_state(folder, STATE))]
    broadcast_object_list(found)
    differences, totals, remarks = found[0]
    if differences and not trainer.args.allow_changes:
        raise ResumeError(
            f"{folder} is of a run with other numbers:\n{table(differences)}\nGo on with what that run had. "
            f"{hint(differences)}To change it from here on set `allow_changes=True` (`--allow_changes`); to train with "
            "it from the start, choose another `output_dir`."
        )
    trainer.changes = {what: (was, now) for what, was, now in [*differences, *totals]}
    trainer.another_optimizer = needs_new_optimizer(trainer.changes)
    if trainer.is_world_process_zero():
        for remark in remarks:
            logger.warning("%s", remark)
        if differences:
            logger.warning("The run goes on with other numbers than %s:\n%s", folder, table(differences))


# -- comparing ---------------------------------------------------------------------------------------------------


def compared(trainer: Any, state: dict[str, Any]) -> tuple[list[Difference], list[Difference], list[str]]:
    """What would give other numbers, another length of the run, and what is only said."""
    now = trainer.beginning = beginning(trainer)
    was = Beginning(state["options"], state["facts"], state["rows"])
    differences = option_differences(was, now, Change.REFUSED) + fact_differences(was, now)
    if state["versions"] == versions(OF_NUMBERS):
        differences += one_sided(was, now)
    rows = row_difference(was.rows, now.rows, trainer.train_dataset)
    if rows is not None:
        differences.append(("data: rows", *rows))
    if rows is not None or now.facts["data: kind"] == "stream":
        differences += causes(was, now)
    totals = option_differences(was, now, Change.TOTAL)
    return differences, totals, [*total_remarks(totals, now), *version_remarks(state["versions"])]


def option_differences(was: Beginning, now: Beginning, change: Change) -> list[Difference]:
    return [(name, *values) for name, values in changed_options(was.options, now.options, change).items()]


def fact_differences(was: Beginning, now: Beginning) -> list[Difference]:
    """Facts that both know and that differ."""
    return [
        (place, was.facts[place], value)
        for place, value in now.facts.items()
        if not place.startswith(PROCESSING) and place in was.facts and was.facts[place] != value
    ]


def one_sided(was: Beginning, now: Beginning) -> list[Difference]:
    """What only one of the two has of a thing that both have, such as an entry of a config. Not for other versions of
    the libraries, of which the configs have other entries.
    """
    both = things(was.facts) & things(now.facts)
    return [
        (place, was.facts.get(place, ABSENT), now.facts.get(place, ABSENT))
        for place in sorted(was.facts.keys() ^ now.facts.keys())
        if not place.startswith(PROCESSING) and place not in FINGERPRINTS and place.rpartition(": ")[0] in both
    ]


def things(facts: dict[str, Any]) -> set[str]:
    """Places that have a value, or other places in them."""
    return facts.keys() | {place.rpartition(": ")[0] for place in facts}


def causes(was: Beginning, now: Beginning) -> list[Difference]:
    """Why rows may be others; of a stream all that may make them others."""
    tokens = [
        (place, was.facts[place], value)
        for place, value in now.facts.items()
        if place.startswith(PROCESSING) and was.facts.get(place) != value
    ]
    return option_differences(was, now, Change.ROWS) + tokens


def total_remarks(changed: list[Difference], now: Beginning) -> list[str]:
    """What another number of steps does to the learning rate."""
    if not changed or not depends_on_total(now.options) or now.facts["scheduler"] != "of the options":
        return []
    what = ", ".join(f"{name} was {before} and is {after}" for name, before, after in changed)
    return [
        f"{what}: the schedule ({now.options['lr_scheduler_type']}) is that of the new number of steps, so the "
        "learning rate is another one from here on."
    ]


def version_remarks(was: dict[str, str]) -> list[str]:
    """Other versions may round otherwise."""
    changed = [
        f"{name} {was[name]} -> {now}" for name, now in versions(OF_NUMBERS).items() if was.get(name) not in (None, now)
    ]
    return [f"Other versions than the checkpoint's: {', '.join(changed)}. Rounding may differ."] if changed else []


def table(differences: list[Difference]) -> str:
    """A line for each difference: what, as it was, as it is."""
    rows = [("", "was", "is"), *((what, shown(was), shown(now)) for what, was, now in differences)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {what:<{first}}  {was:<{second}}  {now}".rstrip() for what, was, now in rows)


def hint(differences: list[Difference]) -> str:
    """What is easily mistaken where a run is resumed."""
    if not any(what.startswith("reference: ") for what, _, _ in differences):
        return ""
    return (
        "The reference is made of the model that the trainer is given: that must be the one which the run was started "
        "with; its trained weights are read from the checkpoint. "
    )


def shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
