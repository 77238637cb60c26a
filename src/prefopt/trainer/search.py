"""Hyperparameter search: what a trial suggests acts, and the objective is a metric of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from transformers.trainer_utils import BestRun, HPSearchBackend

from prefopt.trainer.callbacks import updates_reference
from prefopt.trainer.evaluation import prefixed
from prefopt.trainer.preparing import PreparingTrainer

__all__ = ["SearchingTrainer"]

Measure = Callable[[dict[str, float]], Any]
"""Metrics of an evaluation -> what is optimised, a number or several."""

OF_THE_CONSTRUCTOR = frozenset(
    {
        "max_length",
        "max_completion_length",
        "truncation_mode",
        "on_bad_row",
        "image_roots",
        "layout",
        "padding_free",
        "pad_to_multiple_of",
        "model_init_kwargs",
        "trust_remote_code",
    }
)
"""Options whose work is done when the first trial begins: rows are prepared, and the model is the user's affair."""


class SearchingTrainer(PreparingTrainer):
    """Lets options change between two runs of ``train``, as a trial changes them, and the user by assignment."""

    def hyperparameter_search(
        self,
        hp_space: Callable[..., Any] | None = None,
        compute_objective: Measure | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """See ``transformers.Trainer.hyperparameter_search``; the defaults of objective and direction are others.

        Args:
            hp_space: suggests options of the config, those of the loss among them.
            compute_objective: metrics -> what is optimised; None: ``metric_for_best_model``, or else the loss (not the
                sum of all metrics).
            n_trials: how many trials.
            direction: ``minimize`` or ``maximize``, or one of these for each of several objectives; None: that of the
                metric (``greater_is_better``), and ``minimize`` for an objective of the user's.
            args, kwargs: ``backend`` and ``hp_name``; the backend's own.
        """
        if direction is None:
            up = compute_objective is None and self.args.metric_for_best_model and self.args.greater_is_better
            direction = "maximize" if up else "minimize"
        if compute_objective is None:
            compute_objective = partial(one_metric, name=self.args.metric_for_best_model or "loss")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; options may have changed since the last run."""
        self.take_options(trial)
        try:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            self.is_in_train = False  # also after a trial that was pruned

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.take_options(trial)  # that casts to the type of the old value: a name to a list of letters

    def take_options(self, trial: Any) -> None:
        """The options as ``trial`` suggests them and as they are now: checked, and the objective that they describe.

        Raises:
            ValueError: with every mistake in them.
        """
        suggested = self.suggested(trial)
        if done := sorted(suggested.keys() & OF_THE_CONSTRUCTOR):
            raise ValueError(
                f"The search suggests {', '.join(done)}, which the trainer's constructor has used up: rows are "
                "prepared once for all trials. Make a trainer, and a search, for each value."
            )
        for name, value in suggested.items():
            if hasattr(self.args, name):
                setattr(self.args, name, value)
        self.args.check()
        self.reference_updates = updates_reference(self.args, self.callback_handler.callbacks)
        if self.model_init is not None or self.args._objective_options() != self.preference_options:
            self.make_objective()
        if (own := self.model_reference) is not None:
            own.ld_alpha = self.args.ld_alpha

    def suggested(self, trial: Any) -> Mapping[str, Any]:
        """Option -> value of a trial, empty without one."""
        if trial is None or self.hp_search_backend is None:
            return {}
        if self.hp_search_backend == HPSearchBackend.OPTUNA:
            return self.hp_space(trial)  # type: ignore[operator]
        return {name: value for name, value in trial.items() if name != "wandb"}

    def make_objective(self) -> None:
        """The objective that the options describe, its state as at the start.

        Raises:
            ValueError: it needs a completion that was not prepared.
        """
        made = self.args.objective()
        if not set(made.branches) <= set(self.prepare_options.branches):
            raise ValueError(
                "tpo_alpha was 0 when the rows were prepared, so their gold completions were left out. Make the "
                "trainer with tpo_alpha above 0."
            )
        self.preference, self.preference_options = made, deepcopy(self.args._objective_options())


def one_metric(metrics: Mapping[str, float], *, name: str) -> float:
    """The value of a metric of the evaluation, with or without ``eval_`` before its name.

    Raises:
        ValueError: there is none of that name.
    """
    key = prefixed(name, "eval")
    if key not in metrics:
        raise ValueError(
            f"The search needs the metric {key!r}, and the evaluation gave {', '.join(sorted(metrics))}. Set "
            "metric_for_best_model to one of them, or pass `compute_objective`."
        )
    return metrics[key]
