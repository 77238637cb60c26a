"""``prefopt check RUN.yaml``: whether the run will go through, before it starts."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import users_mistakes
from prefopt.cli.names import check_names
from prefopt.cli.run_file import RunFile, method_and_arguments, read_run_file, without_config

if TYPE_CHECKING:
    from prefopt.inspection.checking.check import Checked
    from prefopt.inspection.checking.problems import Findings

__all__ = ["main"]

USAGE = """\
usage: prefopt check RUN.yaml [--option value ...]

Whether `prefopt train RUN.yaml` will go through, without starting it: all
options, every row of both splits, the tokens, the model, and a few real
optimizer steps, of which the largest that the run will make. Says what memory
and time the run will need. Writes nothing into output_dir.

Every problem is one line: where, what, and what to do. Errors would end the
run, warnings would not.

  --option value   as for prefopt train; the command line wins over the file.
                   Every option: prefopt METHOD --help-all

exit status: 0 the run will go through; 1 it will not; 2 there is no such file,
or an option, in the file or as a flag, has a name that is none
"""
PLACED = re.compile(r"^(.+:\d+): (.*)$", re.DOTALL)
SEVERAL = re.compile(r"^\w+Config: \d+ options are wrong$")
OF_CONFIG = re.compile(r"^(- |\w+Config: )")


def main(arguments: Sequence[str] = ()) -> int:
    """Checks a run; 0: it will go through."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    with users_mistakes():
        method, options = method_and_arguments("check", arguments)
        check_names(method, options)
        flags, path = without_config(options)
        run_file = read_run_file(str(path))
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    try:
        checked, need = everything(method, options, places(run_file, flags), console)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    from prefopt.inspection.checking.display import show

    show(checked, need, console)
    return 0 if checked.findings.will_run else 1


def places(run_file: RunFile, flags: Sequence[str]) -> Callable[[str], str]:
    """Name of an option -> where it is set."""
    given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}

    def place(name: str) -> str:
        if name in given:
            return f"--{name}"
        return run_file.where(name) if name in run_file.lines else f"{run_file.path} ({name} is not in it)"

    return place


def everything(method: str, arguments: list[str], place: Callable[[str], str], console: Any) -> tuple[Checked, Any]:
    """What was found, and what the run will need, where its steps could be tried."""
    from prefopt.inspection.checking.check import Checked, check_run
    from prefopt.inspection.checking.need import run_need
    from prefopt.inspection.checking.problems import Findings, overheard

    checked = Checked(Findings())
    configs = parsed(method, arguments, checked.findings, place)
    if configs is None:
        return checked, None
    script, training, model, mixture, rest = configs
    if rest:
        what = f"{' '.join(rest)}: one process was checked; each of several needs as much, and more to exchange"
        checked.findings.add("note", "options", what)
    asked = {name: getattr(training, name) for name in ("eval_strategy", "eval_steps", "eval_on_start")}
    with quiet(console), overheard(lambda level, message: checked.findings.add_message(level, "data", message)):
        datasets = loaded(script, training, model, mixture, checked.findings, place)
    if datasets:
        from prefopt.cli.train import model_options, trainer_on

        training.model_init_kwargs = model_options(model, training)

        def build(train: Any, evaluation: Any) -> Any:
            return trainer_on(train, evaluation, method, script, training, model)

        name = str(model.model_name_or_path)
        with quiet(console):
            check_run(checked, training, name, datasets, build, place, is_adapter=model.use_peft)
    if checked.trial is None:
        return checked, None
    rows = [0 if found.prepared is None else len(found.prepared) for found in checked.sets]
    is_stream = checked.sets[0].is_stream
    return checked, run_need(SimpleNamespace(**asked), checked.trial, rows[0], sum(rows[1:]), is_stream=is_stream)


def parsed(method: str, arguments: list[str], findings: Findings, place: Callable[[str], str]) -> Any:
    """The configs and what is left of the command line; None where options are wrong, all of which are listed."""
    from prefopt.cli.train import make_parser
    from prefopt.inspection.checking.problems import overheard

    def hear(level: Any, message: str) -> None:
        findings.add_message(level, place_in(message, place), message)

    messages = []
    try:
        with overheard(hear):
            configs = make_parser(method).parse_args_and_config(arguments, return_remaining_strings=True)
    except ValueError as error:
        messages += str(error).splitlines()
    for line in option_lines(messages):
        found = PLACED.match(line)
        findings.add_message("error", *(found.groups() if found else (place_in(line, place), line)))
    return None if messages else configs


def option_lines(messages: Sequence[str]) -> Iterator[str]:
    """What is wrong with options, one line each."""
    for line in messages:
        if not line.startswith("(set in ") and not SEVERAL.match(line):
            yield OF_CONFIG.sub("", line)


def place_in(message: str, place: Callable[[str], str]) -> str:
    """Where the option is set that a message begins with."""
    found = re.match(r"(\w+)=", message)
    return place(found[1]) if found else "options"


def loaded(
    script: Any, training: Any, model: Any, mixture: Any, findings: Findings, place: Callable[[str], str]
) -> dict[str, Any]:
    """Name of a set -> the set; of those that cannot be loaded none."""
    from prefopt.cli.train import image_roots, load_data, missing_names

    for line in missing_names(script, model, mixture):
        name, _, message = line.partition(": ")
        findings.add("error", place(name), f"{name} is not set", message)
    if not findings.will_run:
        return {}
    training.image_roots = training.image_roots or image_roots(script, mixture) or None
    wanted = training.eval_strategy != "no"
    for with_eval in (True, False) if wanted else (False,):
        try:
            train, evaluation = load_data(script, mixture, with_eval=with_eval)
            return {"train": train} | ({} if evaluation is None else {"eval": evaluation})
        except (ValueError, FileNotFoundError) as error:
            findings.add_message("error", place("datasets" if mixture.datasets else "dataset_name"), str(error))
    return {}


@contextmanager
def quiet(console: Any) -> Iterator[None]:
    """What libraries print and draw within is no part of the check; a line says that it is at work."""
    from prefopt.terminal import only_errors

    status = console.status("looking at options, rows, model and steps")
    with status, only_errors("huggingface_hub"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
