"""Trackers: whether they are there, that a run has failed, and that nothing is to be said elsewhere.

transformers ends a tracker's run when training ends. A run that fails does not come to that: its tracker's run would
stay open as long as the process lives, in a notebook for example, and MLflow's would then be called finished.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from transformers.integrations import integration_utils

__all__ = ["check_trackers", "close_failed", "without_telemetry"]

logger = logging.getLogger(__name__)

MLFLOW_TELEMETRY = "MLFLOW_DISABLE_TELEMETRY"
"""MLflow tells its makers of its use when it is imported, whatever machine its runs go to."""


PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""Tracker -> its package, where that is called otherwise."""
LOOKED_FOR = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
"""Tracker -> what transformers calls it where it looks whether it is there, where that is called otherwise."""


def check_trackers(report_to: Iterable[str]) -> None:
    """Hold the trackers of a run against those that there are, and that are installed.

    Raises:
        ValueError: there is no such tracker, or its package is missing.
    """
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in report_to:
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            meant = f", did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(
                f"report_to={name!r}: there is no such tracker{meant} Choose 'none' or among {', '.join(sorted(known))}"
            )
        if not getattr(integration_utils, f"is_{LOOKED_FOR.get(name, name)}_available")():
            raise ValueError(
                f"report_to={name!r}: it is not installed or not set up. Install it with "
                f"`pip install {PACKAGES.get(name, name)}`, or leave it out of report_to"
            )


def without_telemetry(report_to: Iterable[str]) -> None:
    """Keep MLflow from telling its makers of a run; a value that the user has set stays."""
    if "mlflow" in report_to:
        os.environ.setdefault(MLFLOW_TELEMETRY, "true")


def close_failed(callbacks: Iterable[Any]) -> None:
    """End the runs of the trackers among ``callbacks`` as failed; the next training begins new ones.

    Args:
        callbacks: of a trainer whose training has raised.
    """
    for callback in callbacks:
        names = [kind.__name__ for kind in type(callback).__mro__]
        for close in (CLOSERS[name] for name in names if name in CLOSERS):
            try:
                close(callback)
            except Exception as error:  # a tracker is another program, often another machine
                logger.warning("%s was not told that the run has failed: %r", names[0], error)


def close_tensorboard(callback: Any) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.close()
        callback.tb_writer = None


def close_wandb(callback: Any) -> None:
    if callback._initialized:
        callback._wandb.finish(exit_code=1)
        callback._initialized = False


def close_trackio(callback: Any) -> None:
    if callback._initialized:
        callback._trackio.finish()
        callback._initialized = False


def close_mlflow(callback: Any) -> None:
    if callback._initialized and callback._auto_end_run and callback._ml_flow.active_run():
        callback._ml_flow.end_run("FAILED")
        callback._initialized = False


CLOSERS: dict[str, Callable[[Any], None]] = {
    "TensorBoardCallback": close_tensorboard,
    "WandbCallback": close_wandb,
    "TrackioCallback": close_trackio,
    "MLflowCallback": close_mlflow,
}
"""Class of a tracker's callback, or of its parent -> what ends its run as failed."""
