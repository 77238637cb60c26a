"""A run from its options: the same for all methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefopt
from prefopt.cli.model_config import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from prefopt.cli.names import missing_options
from prefopt.cli.parser import PrefParser
from prefopt.data import DatasetMixtureConfig, get_dataset, load_source
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.terminal import harmless
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.saving.masking import without_known_secrets
from prefopt.trainer.versions import end_run

__all__ = ["load_data", "main", "make_parser", "make_trainer", "train"]

logger = logging.getLogger(__name__)


def main(method: str, argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains, in this process: for ``accelerate launch``."""
    script, training, model, mixture = make_parser(method).parse_args_and_config(argv)
    train(make_trainer(method, script, training, model, mixture), script)


def make_parser(method: str) -> PrefParser:
    """The parser of ``ScriptArguments``, the method's config, ``ModelConfig`` and ``DatasetMixtureConfig``."""
    config = getattr(prefopt, f"{method.upper()}Config")
    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    return PrefParser(types, ignored_keys=("method",), prog=f"prefopt {method}")


def make_trainer(
    method: str,
    script: ScriptArguments,
    training: PreferenceConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    """The method's trainer, with data and model loaded.

    Raises:
        ValueError: No model or no data is named, or one of them does not fit.
    """
    show_log()
    if missing := missing_names(script, model, mixture):
        raise ValueError("\n".join(missing))
    training.image_roots = training.image_roots or image_roots(script, mixture) or None
    sets = load_data(script, mixture, with_eval=training.eval_strategy != "no")
    return trainer_on(*sets, method, script, training, model)


def missing_names(script: ScriptArguments, model: ModelConfig, mixture: DatasetMixtureConfig) -> list[str]:
    """What a run must name and this one does not."""
    values = {**vars(model), **vars(script), **vars(mixture)}
    return missing_options({name for name, value in values.items() if value})


def trainer_on(
    train_dataset: Any,
    eval_dataset: Any,
    method: str,
    script: ScriptArguments,
    training: PreferenceConfig,
    model: ModelConfig,
) -> Any:
    """The method's trainer on these sets, with the model loaded."""
    training.model_init_kwargs = model_options(model, training)
    trainer = getattr(prefopt, f"{method.upper()}Trainer")(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if script.ignore_bias_buffers:
        import torch

        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, buffer in buffers if buffer.dtype == torch.bool]
    return trainer


class HarmlessFormatter(logging.Formatter):
    """Lines without secrets, and with nothing that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(without_known_secrets(super().format(record)))


def show_log() -> None:
    """What the package says of a run (layout, context, rows) goes to the terminal; of several ranks one speaks."""
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("prefopt").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def model_options(model: ModelConfig, training: PreferenceConfig) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained``; an explicit ``model_init_kwargs`` wins."""
    options = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    given: Any = training.model_init_kwargs
    return {name: value for name, value in options.items() if value is not None} | dict(given or {})


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig, *, with_eval: bool) -> tuple[Any, Any]:
    """The training set, and the evaluation set where one is wanted.

    Raises:
        ValueError: A split is not there.
        FileNotFoundError: There is no such data set.
    """
    if not mixture.datasets:
        splits = [script.dataset_train_split, *([script.dataset_test_split] if with_eval else [])]
        name = str(script.dataset_name)
        loaded = [load_source(name, script.dataset_config, split, script.dataset_streaming) for split in splits]
        return loaded[0], loaded[1] if with_eval else None
    if script.dataset_name is not None:
        logger.warning("dataset_name=%r is ignored: the mixture in `datasets` is used", script.dataset_name)
    sets = get_dataset(mixture)
    if with_eval and script.dataset_test_split not in sets:
        raise ValueError(
            f"the mixture has no split {script.dataset_test_split!r} to evaluate on; set test_split_size to split one "
            "off, or eval_strategy: 'no'"
        )
    return sets[script.dataset_train_split], sets[script.dataset_test_split] if with_eval else None


def image_roots(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """The folders of the data sets that are on this machine, with the caches that all may use; none without such."""
    names = [config.path for config in mixture.datasets] or [str(script.dataset_name)]
    places = [Path(name).expanduser() for name in names]
    folders = [str(place if place.is_dir() else place.parent) for place in places if place.exists()]
    return [*folders, *DEFAULT_ROOTS[1:]] if folders else []


def train(trainer: Any, script: ScriptArguments) -> None:
    """Trains, saves the final model in ``output_dir``, and pushes it where that was asked for."""
    training = trainer.args
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"written: {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    end_run(trainer)
