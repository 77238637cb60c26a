"""What the file of a sweep says: which trials there are, under which names, and how they take turns."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.sweep.state import Trial
from prefopt.trainer.saving.masking import without_secrets

__all__ = ["KEYS", "Plan", "explicit_trials", "new_trials", "read_plan", "refused_options", "trial_name"]

KEYS = (
    "run",
    "output_dir",
    "parameters",
    "trials",
    "chunk_steps",
    "max_trials",
    "max_at_once",
    "search",
    "num_trials",
    "metric",
    "direction",
    "pruning",
)
"""Of the file."""
SHORT = {"learning_rate": "lr"}
"""In names of trials."""
LONGEST_NAME = 80
NUMBER = re.compile(r"\d+(\.\d*)?[eE][+-]?\d+")
"""Text to YAML 1.1, which wants a point and a sign in it, and a number to everybody else."""
OF_THE_SWEEP = {
    "output_dir": "each trial has its own folder in the sweep's",
    "resume_from_checkpoint": "a sweep goes on by itself when it is started again",
    "allow_changes": "`prefopt sweep clone` goes on with changed options",
    "num_processes": "a sweep trains in one process on one device",
    "accelerate_config": "a sweep trains in one process on one device",
    "fsdp": "a sweep trains in one process on one device",
    "deepspeed": "a sweep trains in one process on one device",
    "push_to_hub": "each pause of each trial would be pushed; push the trial that you choose",
    "save_only_model": "a trial goes on from its checkpoints",
}
"""Options that a run of a sweep may not have, and why."""
OF_THE_PROCESS = (
    "full_determinism",
    "liger_kernel_config",
    "tf32",
    "use_cpu",
    "use_liger_kernel",
)
"""Options that act on the whole process: all trials have the same."""
SECRET = "is a secret, and a trial's own options are in its name and in many files; put it in `run`"
OFF = (None, False, "", [], {})


@dataclass(frozen=True)
class Plan:
    """A sweep as its file describes it; what the search and pruning make of their keys is theirs."""

    folder: Path
    method: str
    base: Mapping[str, Any]
    """The options that all trials have."""
    parameters: Mapping[str, Any]
    """Option -> what it may be, as in the file."""
    trials: tuple[Mapping[str, Any], ...]
    """Explicit ones: option -> value."""
    chunk_steps: int | None
    max_trials: int
    max_at_once: int


def read_plan(values: Mapping[str, Any], method: str, base: Mapping[str, Any]) -> Plan:
    """The plan of a file's values.

    Args:
        values: of the file; keys are among `KEYS`.
        method: of the run that it varies.
        base: that run's options.

    Raises:
        ValueError: with every mistake, a line each.
    """
    problems = [f"{key}: {problem}" for key, problem in _mistakes(values)]
    problems += [f"run: {problem}" for problem in refused_options(base)]
    varied = [values.get("parameters"), *(values.get("trials") or [])] if not problems else []
    problems += [f"{name}: {SECRET}" for name in dict.fromkeys(itertools.chain(*(map(secrets, filter(None, varied)))))]
    if problems:
        raise ValueError("\n".join(problems))
    return Plan(
        folder=Path(values["output_dir"]),
        method=method,
        base={name: value for name, value in base.items() if name != "output_dir"},
        parameters=values.get("parameters") or {},
        trials=tuple(values.get("trials") or ()),
        chunk_steps=values.get("chunk_steps"),
        max_trials=values.get("max_trials", 100),
        max_at_once=values.get("max_at_once", 8),
    )


def _mistakes(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Key -> what is wrong with its value."""
    if not isinstance(values.get("output_dir"), str):
        yield "output_dir", "name the folder of the sweep"
    parameters, trials = values.get("parameters"), values.get("trials")
    if bool(parameters) == bool(trials):
        yield "parameters", "give either `parameters` (option -> values) or `trials` (a list of options)"
    if parameters is not None and not isinstance(parameters, Mapping):
        yield "parameters", f"must be a mapping such as 'beta: [0.1, 0.5]', got {parameters!r}"
    for number, trial in enumerate(trials if isinstance(trials, list) else [], 1):
        if not isinstance(trial, Mapping) or not trial:
            yield "trials", f"number {number} must be a mapping such as 'beta: 0.1', got {trial!r}"
    if trials is not None and not isinstance(trials, list):
        yield "trials", f"must be a list of mappings, got {trials!r}"
    for key in ("chunk_steps", "max_trials", "max_at_once"):
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield key, f"must be a whole number above 0, got {value!r}"


def refused_options(options: Mapping[str, Any]) -> list[str]:
    """What a run of a sweep may not have; its own ``output_dir`` is passed over."""
    return [
        f"{name}={options[name]!r}: {reason}; leave it out"
        for name, reason in OF_THE_SWEEP.items()
        if name != "output_dir" and options.get(name) not in OFF
    ]


def secrets(options: Mapping[str, Any]) -> list[str]:
    """Names of options that hold a secret; ``{values: [...]}`` is a parameter of a sweep."""
    held = {name: value.get("values", value) if isinstance(value, dict) else value for name, value in options.items()}
    return [name for name, value in held.items() if without_secrets(value, name) != value]


def refused_in_trials(options: Mapping[str, Any]) -> list[str]:
    """What one trial may not have of its own."""
    own = [f"{name}: acts on the whole process; set it in `run`" for name in OF_THE_PROCESS if name in options]
    folder = [f"output_dir: {OF_THE_SWEEP['output_dir']}; leave it out"] if "output_dir" in options else []
    hidden = [f"{name}: {SECRET}" for name in secrets(options)]
    return [*refused_options(options), *own, *folder, *hidden]


def explicit_trials(combinations: Sequence[Mapping[str, Any]], check: Callable[[Mapping[str, Any]], list[str]]) -> list:
    """Trials of these options, all checked before the first begins.

    Args:
        combinations: the options of each trial.
        check: what is wrong with the run of a trial's options.

    Raises:
        ValueError: with every mistake of every trial, under its name.
    """
    trials, problems = [], []
    for number, options in enumerate(combinations, 1):
        trial = Trial(trial_name(number, options, len(combinations)), dict(options))
        found = refused_in_trials(options) or check(options)
        problems += [f"{trial.name}: {line}" for text in found for line in text.splitlines()]
        trials.append(trial)
    if problems:
        raise ValueError("\n".join(problems))
    return trials


def new_trials(planned: Sequence[Trial], known: Sequence[Trial]) -> list[Trial]:
    """Those of a file's trials that a sweep does not have yet, by their options; they are numbered after its last.

    Args:
        planned: of the file.
        known: of the sweep; its clones are nobody's.
    """
    theirs = [as_json(trial.options) for trial in known if trial.cloned_from is None]
    found = []
    for trial in planned:
        if (options := as_json(trial.options)) in theirs:
            theirs.remove(options)  # the same configuration may be there twice
        else:
            number = len(known) + len(found) + 1
            found.append(replace(trial, name=trial_name(number, trial.options) if known else trial.name))
    return found


def as_json(options: Mapping[str, Any]) -> str:
    """Options as ``sweep.json`` holds them, to be compared."""
    return json.dumps(options, sort_keys=True, default=str)


def trial_name(number: int, options: Mapping[str, Any], total: int = 99) -> str:
    """A name to read and to type: the number, and the options that are the trial's own.

    >>> trial_name(1, {"beta": 0.1, "learning_rate": "1e-5"})
    '01-beta0.1-lr1e-5'
    """
    parts = [f"{SHORT.get(name, name)}{_short(value)}" for name, value in options.items()]
    whole = "-".join([f"{number:0{max(2, len(str(total)))}}", *parts])
    return re.sub(r"[^A-Za-z0-9._+-]", "_", whole)[:LONGEST_NAME].rstrip(".-")


def _short(value: Any) -> str:
    """A value in a name: numbers as one would write them by hand, lists with a plus."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(_short, value))
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or NUMBER.fullmatch(str(value))):
        return str(value)
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{float(value):g}").replace("e+", "e")
