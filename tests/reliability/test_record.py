"""However a run ends, its folder tells: the rows it has logged, why it ended, and the curves."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start
from short_runs import dataset, log_rows, trainer
from transformers import TrainerCallback

from prefopt import files
from prefopt.report.curves import PANELS, draw, png
from prefopt.trainer.ending import reporting
from prefopt.trainer.ending.record import CURVES, METRICS, RUN, append_row, keep_rows, read_rows, rows_until

STEP = 3
"""After how many steps the runs of this file end."""


OF_THE_ENVIRONMENT = "0123456789abcdef"
"""A key that shows by nothing that it is one."""


class Raising(TrainerCallback):
    """Ends a run in its last step."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end = end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP:
            self.end()


def fail(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def poison(run: Any) -> Callable[[], None]:
    return lambda: next(run.model.parameters()).data.fill_(math.nan)


ENDS: dict[str, tuple[Callable[[Any], Callable[[], Any]], str, str, str]] = {
    "callback": (lambda run: fail(KeyError("no such column")), "failed", "KeyError", "column"),
    "nan": (poison, "failed", "NonFiniteStepError", "step"),
    "sigterm": (lambda run: lambda: os.kill(os.getpid(), signal.SIGTERM), "interrupted", "TerminatedRun", "SIGTERM"),
    "ctrl-c": (lambda run: fail(KeyboardInterrupt()), "interrupted", "KeyboardInterrupt", ""),
    "exit": (lambda run: lambda: sys.exit(3), "interrupted", "SystemExit", "3"),
    "secret": (
        lambda run: fail(OSError(f"403 for https://me:word@host/x?token=abc hf_CANARYCANARY {OF_THE_ENVIRONMENT}")),
        "failed",
        "OSError",
        "403",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_dies_leaves_rows_curves_and_a_reason(tmp_path: Path, end: str, monkeypatch) -> None:
    monkeypatch.setenv(reporting.VARIABLE, "on")
    monkeypatch.setenv("SOME_API_KEY", OF_THE_ENVIRONMENT)
    make, status, kind, word = ENDS[end]
    run = trainer(tmp_path, max_steps=6)
    run.add_callback(Raising(make(run)))
    with pytest.raises(BaseException) as raised:
        run.train()
    assert type(raised.value).__name__ == kind
    steps = STEP + (end == "sigterm")
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, steps + 1))
    record = json.loads((tmp_path / RUN).read_text())
    assert (record["status"], record["steps"], record["reason"]["type"]) == (status, steps, kind)
    assert word in record["reason"]["message"]
    assert record["ended"] >= record["started"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / RUN).read_text()
    assert not [secret for secret in ("word@", "token=abc", "CANARY", OF_THE_ENVIRONMENT) if secret in text]


def test_rows_that_raise_while_they_are_read(tmp_path: Path) -> None:
    rows = dataset(80).to_iterable_dataset().map(broken_at_row_40, with_indices=True)
    with pytest.raises(RuntimeError, match="row 40 is broken"):
        trainer(tmp_path, rows=rows, max_steps=9, per_device_train_batch_size=8).train()
    record = json.loads((tmp_path / RUN).read_text())
    assert (record["status"], record["reason"]["type"]) == ("failed", "RuntimeError")
    assert "row 40 is broken" in record["reason"]["message"]
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, record["steps"] + 1))
    assert record["steps"] >= 1


def broken_at_row_40(row: dict[str, Any], index: int) -> dict[str, Any]:
    if index == 40:
        raise RuntimeError("row 40 is broken")
    return row


def test_kill_leaves_what_was_logged_and_the_next_run_says_so(tmp_path: Path, caplog) -> None:
    process = start(killed, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, STEP + 1))
    record = json.loads((tmp_path / RUN).read_text())
    assert (record["status"], record["pid"]) == ("running", process.pid)
    trainer(tmp_path, max_steps=1).train()
    assert f"did not end (it was killed): last logged step {STEP}" in caplog.text
    assert json.loads((tmp_path / RUN).read_text())["status"] == "finished"


def killed(folder: Path) -> None:
    run = trainer(folder, max_steps=6)
    run.add_callback(Raising(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    run.train()


def test_the_file_holds_every_row_that_was_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, eval_dataset=dataset(6, seed=3), eval_strategy="steps", eval_steps=1)
    run.evaluate()
    run.train()
    rows = read_rows(tmp_path / METRICS)
    before, during = rows[:1], rows[1:]
    assert ["eval_loss" in row for row in before] == [True]
    assert [{k: v for k, v in row.items() if k != "time"} for row in during] == run.state.log_history
    run.evaluate(metric_key_prefix="eval_test")
    assert "eval_test_loss" in read_rows(tmp_path / METRICS)[-1]
    assert json.loads((tmp_path / RUN).read_text())["status"] == "finished"


def test_a_new_run_keeps_the_rows_of_the_one_before_aside(tmp_path: Path) -> None:
    first, second = trainer(tmp_path, max_steps=1), trainer(tmp_path, max_steps=2)
    first.train()
    kept = (tmp_path / METRICS).read_text()
    second.train()
    assert (tmp_path / "metrics-1.jsonl").read_text() == kept
    assert len(read_rows(tmp_path / METRICS)) == len(log_rows(second)) == 3


def test_a_row_is_on_the_disk_before_a_callback_sees_it(tmp_path: Path) -> None:
    seen = []

    class Failing(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            seen.append(len(read_rows(tmp_path / METRICS)))
            raise RuntimeError("tracker")

    with pytest.raises(RuntimeError, match="tracker"):
        trainer(tmp_path, callbacks=[Failing()]).train()
    assert seen == [1]


@pytest.mark.parametrize("end", ["callback", "sigterm", None])
def test_a_record_that_cannot_be_written_changes_nothing_of_the_run(tmp_path: Path, end: str | None, caplog) -> None:
    run = trainer(tmp_path, max_steps=STEP + 1, save_strategy="steps", save_steps=1)
    kind = None
    if end is not None:
        make, _, kind, _ = ENDS[end]
        run.add_callback(Raising(make(run)))

    def full(operation: str, path: Path) -> None:
        if RUN in path.name or path.name == METRICS:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    raised: BaseException | None = None
    with files.observed(full):
        try:
            run.train()
        except BaseException as error:
            raised = error
    assert (None if raised is None else type(raised).__name__) == kind
    assert getattr(raised, "code", 143) == 143
    assert run.state.global_step == STEP + (end != "callback")
    assert (tmp_path / f"checkpoint-{run.state.global_step}").is_dir()
    assert f"{RUN} was not written" in caplog.text
    assert f"{METRICS} was not written" in caplog.text


def test_a_refused_resume_leaves_the_record_of_the_run_before(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(reporting.VARIABLE, "on")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=1, **options).train()
    before = [(tmp_path / name).read_bytes() for name in (RUN, METRICS, CURVES)]
    with pytest.raises(ValueError, match="beta"):
        trainer(tmp_path, max_steps=2, beta=0.7, **options).train(resume_from_checkpoint=True)
    assert [(tmp_path / name).read_bytes() for name in (RUN, METRICS, CURVES)] == before


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_what_is_no_number_is_null_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    append_row(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "x": np.float64(-math.inf), "y": np.int64(2)})
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (row["loss"], row["grad_norm"], row["x"], row["y"]) == (None, None, None, 2)
    assert row["not_finite"] == {"loss": "nan", "grad_norm": "inf", "x": "-inf"}


def test_what_lies_within_a_value_is_strict_json_too(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    values = {
        "per_class": [math.nan, (1, np.float32(math.inf)), {"a": torch.tensor(-math.inf), 2: True}],
        "scalar": torch.tensor(math.nan, dtype=torch.bfloat16),
        "matrix": np.array([[0.5, math.nan]]),
        "long": np.longdouble(1.5),
        "flag": np.bool_(False),
        "complex": np.clongdouble(1j),
        "text": Path("a"),
    }
    append_row(path, {"step": 1, **values})
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["per_class"] == [None, [1, None], {"a": None, "2": True}]
    assert (row["scalar"], row["matrix"], row["long"], row["flag"], row["text"]) == (
        None,
        [[0.5, None]],
        1.5,
        False,
        "a",
    )
    assert row["not_finite"] == {
        "per_class.0": "nan",
        "per_class.1.1": "inf",
        "per_class.2.a": "-inf",
        "scalar": "nan",
        "matrix.0.1": "nan",
    }


@pytest.mark.parametrize(("step", "at_step", "left"), [(2, 1, [0, 1, 2]), (2, 2, [0, 1, 2, 3]), (3, 0, [0, 1, 2, 3])])
def test_rows_after_a_checkpoint_are_taken_out(tmp_path: Path, step: int, at_step: int, left: list[int]) -> None:
    path = tmp_path / METRICS
    for number, at in enumerate([0, 1, 2, 2, 3, 2]):
        append_row(path, {"step": at, "number": number})
    with path.open("a") as file:
        file.write('{"step": 4, "numb')
    keep_rows(path, rows_until(step, at_step))
    assert [row["number"] for row in read_rows(path)] == left


# -- the curves --------------------------------------------------------------------------------------------------------


def test_curves_show_training_beside_evaluation() -> None:
    metrics = [metric for panel in PANELS for metric in panel.metrics]
    train = [{"step": step, **dict.fromkeys(metrics, step / 10)} for step in range(1, 5)]
    train[2] |= {"loss": None, "not_finite": {"loss": "nan"}}
    evaluated = {"step": 4, **{f"eval_{name}_{metric}": 0.5 for metric in metrics for name in ("one", "two")}}
    figure = draw([*train, evaluated], "DPO")
    assert len(figure.axes) == len(PANELS)
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [label.split()[0] for label in labels if label != "not finite"] == [
            "train",
            "eval_one",
            "eval_two",
        ] * len(panel.metrics)
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    loss = figure.axes[0].get_lines()[0]
    assert loss.get_xdata().tolist() == [1, 2, 3, 4]
    assert np.isnan(loss.get_ydata()).tolist() == [False, False, True, False]
    assert png(figure).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_run_does_not_fail_for_its_curves(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv(reporting.VARIABLE, "on")
    monkeypatch.setattr(reporting, "draw", lambda *args: fail(RuntimeError("no fonts"))())
    trainer(tmp_path, max_steps=1).train()
    assert "curves.png was not made" in caplog.text
    assert json.loads((tmp_path / RUN).read_text())["status"] == "finished"
