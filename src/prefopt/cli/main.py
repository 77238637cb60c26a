"""The command ``prefopt``: each command imports only what it needs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType

from prefopt.cli.errors import UserError, users_mistakes
from prefopt.cli.usage import ALONE, COMMANDS, METHODS, TRAIN, method_usage, usage
from prefopt.terminal import harmless

__all__ = ["main"]

HELP_FLAGS = {"-h", "--help"}
EVERY_OPTION = "--help-all"
MODULES = {name: f"prefopt.cli.{name}" for name in COMMANDS.keys() - METHODS.keys() - {"train"}}
"""Command -> the module whose ``main(arguments)`` runs it and returns the exit status; training is done here."""
READER_GONE = 128 + 13
"""Exit status where what reads the output has ended, as `head` does: as a shell shows SIGPIPE."""
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Lets torch ask for large pages on a CPU, where faults of small ones cost a good part of a step. Torch reads it once,
when it first allocates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for what is the user's to mend, 128 + N after signal N."""
    os.environ.setdefault(LARGE_PAGES, "1")
    sys.excepthook = _show_failure
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in HELP_FLAGS | {EVERY_OPTION}:
        print(usage())
        return 0
    if command not in METHODS:  # whose help says where every option is
        arguments = ["--help" if argument == EVERY_OPTION else argument for argument in arguments]
    if not arguments and command not in ALONE:
        arguments = ["--help"]
    try:
        status = _run(command, arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return READER_GONE
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich's answer to it is status 1, which means something else
            return READER_GONE
        raise
    except UserError as error:
        if os.environ.get("PREFOPT_TRACEBACK"):
            raise
        print(_shown(f"prefopt: {error}"), file=sys.stderr)
        return 2


def _shown(text: str) -> str:
    """A message without the secrets of this process, and with nothing that a terminal would obey."""
    from prefopt.trainer.saving.masking import without_known_secrets

    return harmless(without_known_secrets(text))


def _show_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that nobody caught, as Python shows it."""
    sys.stderr.write(_shown("".join(traceback.format_exception(kind, error, trace))))


def _run(command: str, arguments: list[str]) -> int:
    if command in METHODS:
        return _train(command, arguments)
    if command == "train":
        return _train_file(arguments)
    if command not in MODULES:
        from prefopt.cli.run_file import nearest

        raise UserError(f"there is no command {command!r}{nearest(command, COMMANDS)}; see prefopt --help")
    return import_module(MODULES[command]).main(arguments) or 0


def _ends_that_say_what_to_do() -> tuple[type[Exception], ...]:
    from prefopt.trainer.best_metric import BestMetricError
    from prefopt.trainer.guards.nonfinite import NonFiniteStepError
    from prefopt.trainer.guards.out_of_memory import MicroBatchMemoryError
    from prefopt.trainer.saving.checkpointing import CheckpointNotWrittenError, FolderInUseError
    from prefopt.trainer.saving.continuation import ResumeError

    of_checkpoints = (CheckpointNotWrittenError, FolderInUseError, ResumeError)
    return BestMetricError, MicroBatchMemoryError, NonFiniteStepError, *of_checkpoints


def _train_file(arguments: list[str]) -> int:
    """``prefopt train RUN.yaml --option value``."""
    if HELP_FLAGS & set(arguments):
        print(TRAIN, end="")
        return 0
    from prefopt.cli.run_file import method_and_arguments

    with users_mistakes():
        method, options = method_and_arguments("train", arguments)
    return _train(method, options)


def _train(method: str, arguments: list[str]) -> int:
    """Checks the names of all options, then the options, and only then loads anything."""
    if HELP_FLAGS & set(arguments):
        print(method_usage(method))
        return 0
    if EVERY_OPTION in arguments:
        from prefopt.cli.train import make_parser

        make_parser(method).print_help()
        return 0
    from prefopt.cli.names import check_given, check_names

    with users_mistakes():
        check_names(method, arguments)
        check_given(arguments)

    from prefopt.cli.launch import launch, plan_launch
    from prefopt.cli.train import make_parser, make_trainer, train

    with users_mistakes():
        *configs, rest = make_parser(method).parse_args_and_config(arguments, return_remaining_strings=True)
        plan = plan_launch(method, arguments, rest)
    if plan is not None:
        launch(plan)
    with users_mistakes():
        trainer = make_trainer(method, *configs)
    from prefopt.trainer.ending.signals import InterruptedRun, TerminatedRun

    try:
        train(trainer, configs[0])
    except (InterruptedRun, TerminatedRun) as stopped:  # the run has said what is to be said
        return 128 + stopped.signal
    except _ends_that_say_what_to_do() as error:
        raise UserError(str(error)) from error
    return 0


if __name__ == "__main__":
    from prefopt.cli.launch import leave

    leave(main())
