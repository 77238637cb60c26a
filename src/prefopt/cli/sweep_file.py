"""The file of a sweep: the run that it varies, the trials, and each trial's run as plain objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.cli.names import known_names
from prefopt.cli.run_file import RunFile, nearest, read_run_file, read_yaml
from prefopt.cli.usage import METHODS
from prefopt.files import replace_file
from prefopt.sweep.plan import KEYS, Plan, read_plan
from prefopt.sweep.state import Trial, trial_folder
from prefopt.sweep.strategy import Strategy, read_strategy

if TYPE_CHECKING:
    from prefopt.sweep.chunks import Run

__all__ = ["RUN_FILE", "SweepFile", "read_sweep_file"]

RUN_FILE = "run.yaml"
"""In the folder of a trial: its run, to be looked at, and to be trained alone with ``prefopt train``."""


@dataclass(frozen=True)
class TrialFile(RunFile):
    """A trial's run: the options of the run that is varied, and those that are the trial's own."""

    def where(self, key: str) -> str:
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file describes it.

    Args:
        path: of the file.
        base: the run that is varied.
        plan: folder, trials and turns.
        strategy: what is tried, and what given up.
    """

    path: Path
    base: RunFile
    plan: Plan
    strategy: Strategy

    def options(self, trial: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Every option of the run of a trial, by its own options and its folder."""
        return {"disable_tqdm": True, "run_name": folder.name, **self.plan.base, **trial, "output_dir": str(folder)}

    def configs(self, trial: Mapping[str, Any], folder: Path) -> tuple[Any, ...]:
        """The run of a trial as the commands' configs: script, training, model, mixture.

        Raises:
            ValueError: with every mistake in its options.
        """
        from prefopt.cli.train import make_parser

        values = self.options(trial, folder)
        run_file = TrialFile(self.base.path, values, {k: v for k, v in self.base.lines.items() if k not in trial}, {})
        return make_parser(self.plan.method).parse_run_file(run_file)

    def check(self, trial: Mapping[str, Any]) -> list[str]:
        """What is wrong with the run of a trial's options."""
        from prefopt.cli.check import option_lines
        from prefopt.cli.model_config import get_peft_config, get_quantization_config
        from prefopt.cli.train import missing_names

        known = known_names(self.plan.method)
        if unknown := [f"unknown option {name!r}{nearest(name, known)}" for name in trial if name not in known]:
            return unknown
        try:
            script, _, model, mixture = self.configs(trial, self.plan.folder)
            get_peft_config(model)
            get_quantization_config(model)
        except (ValueError, TypeError, ImportError) as error:
            return list(option_lines(str(error).splitlines()))
        return missing_names(script, model, mixture)

    def run(self, trial: Trial) -> Run:
        """The run of a trial, which is written down in its folder."""
        import prefopt
        from prefopt.cli.model_config import get_peft_config, get_quantization_config
        from prefopt.cli.train import image_roots, load_data, model_options
        from prefopt.sweep.chunks import Run

        folder = trial_folder(self.plan.folder, trial.name)
        script, training, model, mixture = self.configs(trial.options, folder)
        training.image_roots = training.image_roots or image_roots(script, mixture) or None
        training.model_init_kwargs = model_options(model, training)
        with_eval = training.eval_strategy != "no"
        self.write_down(trial, folder)
        return Run(
            trainer=getattr(prefopt, f"{self.plan.method.upper()}Trainer"),
            args=training,
            model=model.model_name_or_path,
            quantization=get_quantization_config(model),
            peft=get_peft_config(model),
            data=repr((script, mixture, with_eval)),
            load_data=lambda: load_data(script, mixture, with_eval=with_eval),
        )

    def write_down(self, trial: Trial, folder: Path) -> None:
        """``run.yaml`` of a trial, without secrets."""
        import yaml

        from prefopt.trainer.saving.masking import without_secrets

        if not (folder / RUN_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            values = without_secrets({"method": self.plan.method, **self.options(trial.options, folder)})
            replace_file(folder / RUN_FILE, yaml.safe_dump(values, sort_keys=False))

    def changed(self, trials: tuple[Trial, ...]) -> list[str]:
        """What differs between the runs of trials that have begun and what the file now says, where it decides their
        numbers."""
        from prefopt.trainer.saving.changes import Change, change_of
        from prefopt.trainer.saving.masking import without_secrets

        problems = []
        for trial in trials:
            folder = trial_folder(self.plan.folder, trial.name)
            if not (folder / RUN_FILE).is_file():
                continue
            was = read_yaml(folder / RUN_FILE)[0]
            now = without_secrets({"method": self.plan.method, **self.options(trial.options, folder)})
            for name in sorted(was.keys() | now.keys()):
                if was.get(name) != now.get(name) and change_of(name) is not Change.FREE:
                    problems.append(f"{trial.name}: {name} was {was.get(name)!r} and is {now.get(name)!r}")
        return problems


def read_sweep_file(path: str | Path, output_dir: str | None = None) -> SweepFile:
    """Read the file of a sweep, and the run file that it names.

    Args:
        path: of the file.
        output_dir: in place of the file's.

    Raises:
        ValueError: with every mistake in its keys, a line each.
        FileNotFoundError: It, or the run file, is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; prefopt sweep wants the path of a YAML file")
    values, lines = read_yaml(path)
    values |= {} if output_dir is None else {"output_dir": output_dir}
    base = base_run(path, values, lines)
    method = base.values.get("method", "dpo")
    problems = list(wrong_keys(path, values, lines, base, method))
    if problems:
        raise ValueError("\n".join(problems))
    base.set_environment()
    options = {name: value for name, value in base.values.items() if name != "method"}
    plan = read_plan(values, method, options)
    return SweepFile(path, base, plan, read_strategy(values, str(options.get("eval_strategy", "no"))))


def base_run(path: Path, values: Mapping[str, Any], lines: Mapping[str, int]) -> RunFile:
    """The run that is varied: of the file that ``run`` names, or as it stands there.

    Raises:
        ValueError: there is none.
        FileNotFoundError: the file that is named is not there.
    """
    run = values.get("run")
    if isinstance(run, str):
        beside = path.parent / run
        return read_run_file(beside if beside.is_file() else run)
    if not isinstance(run, dict):
        raise ValueError(f"{path}: run: name the run file that is varied (run: base.yaml), or put its options there")
    options = {str(key).replace("-", "_"): value for key, value in run.items()}
    env = {str(key): str(value) for key, value in (options.pop("env", None) or {}).items()}
    return RunFile(str(path), options, dict.fromkeys(options, lines["run"]), env)


def wrong_keys(
    path: Path, values: Mapping[str, Any], lines: Mapping[str, int], base: RunFile, method: str
) -> Iterator[str]:
    """Keys that are none, of the file, of the run and of the trials."""
    if method not in METHODS:
        yield f"{base.where('method')}: method={method!r}: must be one of {', '.join(METHODS)}"
        return
    known = known_names(method)
    for key in values:
        if key not in KEYS:
            hint = "; it is an option of the run: put it under `run`" if key in known else nearest(key, KEYS)
            yield f"{path}:{lines.get(key, 1)}: unknown key {key!r}{hint}"
    for key in base.values:
        if key not in known | {"method"}:
            yield f"{base.where(key)}: unknown key {key!r}{nearest(key, known)}"
    trials = values.get("trials")
    named = {"parameters": [values.get("parameters")], "trials": trials if isinstance(trials, list) else []}
    for key, mappings in named.items():
        for name in dict.fromkeys(name for one in mappings if isinstance(one, dict) for name in one):
            if name not in known:
                yield f"{path}:{lines[key]}: {key}: unknown option {name!r}{nearest(str(name), known)}"
