"""A whole check, from parsed options to a list of problems and what a run will need."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.data.report import SKIPPED, PrepareReport, Status
from prefopt.inspection.checking.problems import Findings, Level, divided, overheard
from prefopt.inspection.checking.rows import CheckedRows, check_rows
from prefopt.inspection.checking.trial import PREFIX, Trial, try_run
from prefopt.scoring.forward import innermost
from prefopt.trainer.rows import check_pair_numbers, prepare_options
from prefopt.trainer.saving.continuation import ResumeError
from prefopt.trainer.saving.resuming import chosen_checkpoint
from prefopt.trainer.setup import check_output_dir, load_config, load_processing_class
from prefopt.trainer.trackers import check_trackers

__all__ = ["Checked", "ModelFacts", "check_run"]

USUAL_RATES = {False: (1e-7, 1e-4), True: (1e-6, 1e-3)}
"""Whether an adapter is trained -> learning rates that papers and recipes of preference training have."""
FAR = 10.0
"""Times the usual that is worth a warning; a small model may want it."""
FIXES = {
    SKIPPED[Status.EMPTY]: "Fill the completion in, or drop the row; a run leaves it out.",
    SKIPPED[Status.EQUAL]: "There is nothing to prefer: drop the row; a run leaves it out.",
    SKIPPED[Status.CUT_AWAY]: "Raise max_length, or shorten the prompt; a run leaves the row out.",
    SKIPPED[Status.EQUAL_WHEN_CUT]: "Raise max_length; a run leaves the row out.",
    SKIPPED[Status.IMAGES_CUT]: "Raise max_length; a run leaves the row out.",
}
LOSS_TOLERANCE = 0.02
"""Nats by which bfloat16 may move the mean of a step from ln 2; float32 stays within a millionth."""
NAMED = 5
"""Rows that are listed for each thing that is wrong with several; all are counted."""


@dataclass(frozen=True)
class ModelFacts:
    """What is trained, and how its batches are laid out."""

    name: str
    parameters: int
    trained: int
    layout: str
    device: str
    precision: str


@dataclass
class Checked:
    """All that a check found out."""

    findings: Findings
    sets: list[CheckedRows] = field(default_factory=list)
    model: ModelFacts | None = None
    trial: Trial | None = None


def check_run(
    checked: Checked,
    args: Any,
    model: str,
    datasets: dict[str, Any],
    build: Callable[[Any, Any], Any],
    place: Callable[[str], str],
    *,
    is_adapter: bool,
) -> None:
    """Looks at rows, model and some steps of a run; ``checked`` takes what is found.

    Args:
        checked: what was found so far.
        args: the config, which is changed: use it for nothing else afterwards.
        model: name of the model.
        datasets: ``train``, and ``eval`` where there is one.
        build: training and evaluation rows, prepared -> the trainer.
        place: name of an option -> where it is set.
        is_adapter: an adapter is trained, not the model's own weights.
    """
    findings = checked.findings

    def hear(level: Level, message: str) -> None:
        what, fix = (message, "") if level == "note" else divided(message)
        findings.add(level, place_of(message, args, place), what, fix)

    with overheard(hear):
        check_options(args, is_adapter, findings, place)
        checkpoint = checkpoint_of(args, findings, place)
        if check_sets(checked, args, model, datasets, place):
            check_steps(checked, args, build, place, checkpoint)


def check_sets(checked: Checked, args: Any, model: str, datasets: dict[str, Any], place: Callable[[str], str]) -> bool:
    """Looks at every row; whether there is something to train on."""
    findings = checked.findings
    try:
        processing_class = load_processing_class(None, model, args)
        options = prepare_options(args, args.objective().branches, load_config(model, args))
    except (OSError, ValueError) as error:
        findings.add_message("error", place("model_name_or_path"), shown(error))
        return False
    for name, dataset in datasets.items():
        rows = check_rows(dataset, processing_class, options, name)
        checked.sets.append(rows)
        list_rows(findings, rows, is_error=args.on_bad_row == "error")
        if rows.prepared is not None:
            try:
                check_pair_numbers(rows.prepared, args.objective(), name)
            except ValueError as error:
                findings.add_message("error", f"{name} data", str(error))
                return False
    return checked.sets[0].prepared is not None


def check_options(args: Any, is_adapter: bool, findings: Findings, place: Callable[[str], str]) -> None:
    """A folder that cannot be written to, trackers that are not there, a learning rate far above what others use."""
    for name, look in (
        ("output_dir", lambda: check_output_dir(str(args.output_dir))),
        ("report_to", lambda: check_trackers(args.report_to or ())),
    ):
        try:
            look()
        except ValueError as error:
            findings.add_message("error", place(name), str(error))
    low, high = USUAL_RATES[is_adapter]
    if args.learning_rate > FAR * high:
        what = f"learning_rate={args.learning_rate:g} is {args.learning_rate / high:.3g} times the usual at most"
        of = "an adapter" if is_adapter else "a whole model"
        findings.add(
            "warning", place("learning_rate"), what, f"Of {of} it is {low:g} to {high:g}; a run may diverge above."
        )


def checkpoint_of(args: Any, findings: Findings, place: Callable[[str], str]) -> str | None:
    """The checkpoint that the run would go on from; None where it begins, or where there is none that it can take."""
    try:
        return chosen_checkpoint(args, args.resume_from_checkpoint, Path(str(args.output_dir)))
    except ResumeError as error:
        findings.add_message("error", place("resume_from_checkpoint"), shown(error))
        return None


def list_rows(findings: Findings, rows: CheckedRows, *, is_error: bool) -> None:
    """Each broken row, each that is left out, and what was noticed of others; of many alike the first few.

    Args:
        findings: takes them.
        rows: of one set.
        is_error: a row with nothing to learn from ends the run (``on_bad_row: error``).
    """
    data = f"{rows.name} data"
    if rows.message is not None:
        findings.add_message("error", data, rows.message.removeprefix(f"{data}: ").removeprefix(f"{data}, "))
    groups: dict[tuple[str, str], list[Any]] = {}
    for error in rows.broken:
        groups.setdefault((error.column, error.fix), []).append(error)
    for (column, fix), errors in groups.items():
        for error in errors[:NAMED]:
            findings.add("error", f"{data}, row {error.row}, column {column!r}", error.problem, fix)
        if more := len(errors[NAMED:]):
            findings.add("error", f"{data}, column {column!r}", f"{more} more rows like these", fix, more)
    level: Level = "error" if is_error else "warning"
    for reason, numbers in rows.report.skipped.items():
        fix = FIXES.get(reason, "Drop the row; a run leaves it out.")
        for number in numbers[:NAMED]:
            findings.add(level, f"{data}, row {number}", reason, fix)
        if more := len(numbers[NAMED:]):
            findings.add(level, data, f"{more} more rows: {reason}", fix, more)
    noticed = PrepareReport(**{**vars(rows.report), "skipped": {}, "num_rows": rows.num_rows})
    for line in noticed.lines():
        findings.add_message("warning", data, line.removeprefix(f"{data}: "))
    if rows.is_stream:
        findings.add("note", data, f"a stream: its first {rows.num_rows} rows were looked at")


def check_steps(
    checked: Checked,
    args: Any,
    build: Callable[[Any, Any], Any],
    place: Callable[[str], str],
    checkpoint: str | None,
) -> None:
    """Some real steps, on the rows that can be trained on; and whether ``checkpoint`` is of this run."""
    findings = checked.findings
    prepared = {rows.name: rows.prepared for rows in checked.sets}
    if checked.sets[0].is_stream and args.max_steps <= 0:
        fix = "Set max_steps: a stream does not say how many rows it has."
        findings.add("error", place("max_steps"), "max_steps is not set, and the training set is streamed", fix)
        return
    comparable = None if checked.sets[0].is_stream or checked.sets[0].broken else checkpoint
    try:
        trainer, trial = try_run(args, lambda: build(prepared["train"], prepared.get("eval")), comparable)
    except ResumeError as error:
        findings.add_message("error", place("resume_from_checkpoint"), str(error))
        return
    except Exception as error:
        message = shown(error)
        findings.add_message("error", place_of(message, args, place, "model"), message)
        return
    checked.trial = trial
    checked.model = facts(trainer)
    if trial.expected_loss is not None and abs(trial.loss - trial.expected_loss) > LOSS_TOLERANCE:
        what = f"the first loss is {trial.loss:.4f}, not {trial.expected_loss:.4f} (ln 2)"
        findings.add("warning", "model", what, "Policy and reference differ before training: look at dropout.")


def facts(trainer: Any) -> ModelFacts:
    """What the trainer made of the model."""
    model: Any = innermost(trainer.model)
    parameters = list(trainer.model.parameters())
    return ModelFacts(
        name=type(model).__name__,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        layout=trainer.layout.layout,
        device=str(trainer.args.device),
        precision=trainer.accelerator.mixed_precision.replace("no", str(model.dtype).removeprefix("torch.")),
    )


def place_of(message: str, args: Any, place: Callable[[str], str], otherwise: str = "run") -> str:
    """Where the option is set that a message names first; ``otherwise`` where it names none."""
    names = (found[1] or found[2] for found in re.finditer(r"`(\w+)`|\b(\w+)=", message))
    name = next((name for name in names if name in args.__dataclass_fields__), None)
    return otherwise if name is None else place(name)


def shown(error: Exception) -> str:
    """The message of an error, and its type where it is not meant for users; without the folder of the trial, which is
    gone."""
    text = " ".join(re.sub(rf" [^.]*{PREFIX}\S*", "", str(error)).split()) or type(error).__name__
    is_for_users = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("prefopt.")
    return text if is_for_users else f"{type(error).__name__}: {text}"
