"""Completions of a few prompts of an evaluation set: as rows, as text, in a file, and in trackers.

=================== ========================================================================
tracker             where the samples are
=================== ========================================================================
TensorBoard         text, one for each evaluation
Weights & Biases    a ``wandb.Table`` for each evaluation
Trackio             a ``trackio.Table`` for each evaluation
MLflow, DagsHub     the artifact ``<set>/samples.json``, which grows
Comet               a table of the experiment for each evaluation
ClearML             a table among the plots, for each evaluation
=================== ========================================================================

The others of transformers' trackers have no tables.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.files import append_line
from prefopt.terminal import harmless
from prefopt.trainer.ending.record import keep_rows

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FILE", "Sample", "SampleTable", "append_to_file", "drop_later_than", "send", "summary"]

logger = logging.getLogger(__name__)

FILE = "samples.jsonl"
"""In the run's folder: a line for each sample, with all its text."""
LINE_WIDTH = 110


@dataclass(frozen=True)
class Sample:
    """A prompt, the completions of its row, and what the models make of it."""

    prompt: str
    chosen: str
    rejected: str
    policy: str
    reference: str | None
    """None where there is no reference."""


@dataclass(frozen=True)
class SampleTable:
    """The samples of one evaluation."""

    name: str
    """Of the evaluation set: ``eval``, ``eval_<name>``."""
    step: int
    """Optimizer steps that the policy had taken."""
    samples: Sequence[Sample]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A mapping for each sample: step, prompt and completions; no reference where there is none."""
        rows = [{"step": self.step, **asdict(sample)} for sample in self.samples]
        return [{column: value for column, value in row.items() if value is not None} for row in rows]

    @property
    def frame(self) -> pd.DataFrame:
        import pandas as pd  # half a second, which `prefopt quickstart --help` need not wait for

        return pd.DataFrame(self.rows)


def summary(table: SampleTable) -> str:
    """The first sample in a few lines, each cut to the width of a terminal."""
    first = asdict(table.samples[0])
    lines = [f"samples of {table.name} at step {table.step}, the first of {len(table.samples)} (all in {FILE}):"]
    for column, value in first.items():
        if value is not None:
            text = harmless(" ".join(value.split()))
            lines.append(f"  {column:<10} {text if len(text) <= LINE_WIDTH else text[: LINE_WIDTH - 2] + ' …'}")
    return "\n".join(lines)


# -- the file ----------------------------------------------------------------------------------------------------------


def append_to_file(table: SampleTable, folder: str) -> None:
    """A line of JSON for each sample at the end of ``FILE``."""
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in table.rows:
        append_line(path, json.dumps({"set": table.name, **row}, ensure_ascii=False))


def drop_later_than(step: int, folder: str, *, again: bool = False) -> None:
    """Leave in ``FILE`` what a run that now begins at ``step`` had written when it was there; of a new run, nothing.

    Args:
        step: 0 for a new run.
        folder: of the run.
        again: the evaluation of that step is made again.
    """
    keep_rows(Path(folder, FILE), lambda row: step > 0 and row["step"] <= step - again)


# -- trackers ----------------------------------------------------------------------------------------------------------


def to_tensorboard(callback: Any, table: SampleTable) -> None:
    callback.tb_writer.add_text(f"{table.name}/samples", markdown(table), table.step)


def to_wandb(callback: Any, table: SampleTable) -> None:
    shown = callback._wandb.Table(dataframe=table.frame)
    callback._wandb.log({f"{table.name}/samples": shown, "train/global_step": table.step})


def to_trackio(callback: Any, table: SampleTable) -> None:
    shown = callback._trackio.Table(dataframe=table.frame)
    callback._trackio.log({f"{table.name}/samples": shown, "train/global_step": table.step})


def to_mlflow(callback: Any, table: SampleTable) -> None:
    callback._ml_flow.log_table(table.frame, artifact_file=f"{table.name}/samples.json")


def to_comet(callback: Any, table: SampleTable) -> None:
    callback._experiment.log_table(f"{table.name}-samples-{table.step}.csv", tabular_data=table.frame)


def to_clearml(callback: Any, table: SampleTable) -> None:
    report = callback._clearml_task.get_logger().report_table
    report(title=f"{table.name}/samples", series="samples", iteration=table.step, table_plot=table.frame)


SENDERS: dict[str, Callable[[Any, SampleTable], None]] = {
    "TensorBoardCallback": to_tensorboard,
    "WandbCallback": to_wandb,
    "TrackioCallback": to_trackio,
    "MLflowCallback": to_mlflow,
    "CometCallback": to_comet,
    "ClearMLCallback": to_clearml,
}
"""Class of a tracker's callback, or of its parent -> what gives it a table."""


def send(table: SampleTable, callbacks: Iterable[Any]) -> None:
    """Give the table to every tracker among ``callbacks``; one that fails is named in a warning."""
    for callback in callbacks:
        names = [kind.__name__ for kind in type(callback).__mro__]
        for sender in (SENDERS[name] for name in names if name in SENDERS):
            try:
                sender(callback, table)
            except Exception as error:  # a tracker is another program, often another machine
                logger.warning("%s did not take the samples of step %d: %r", names[0], table.step, error)


def markdown(table: SampleTable) -> str:
    """A table for viewers of Markdown; line breaks and bars are written as HTML."""
    columns = list(table.frame.columns)
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in table.rows)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """A text that Markdown and HTML show as it is: no link, image or tag in it is one."""
    text = re.sub(r"[\\`*_~\[\]!|]|:(?=//)", lambda match: f"&#{ord(match[0])};", escape(text, quote=False))
    return harmless(text).replace("\n", "<br>")
