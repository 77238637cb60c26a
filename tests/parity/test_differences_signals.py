"""Signals, and what a run leaves of itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from parity_harness import REFERENCE, build
from tiny_models import tiny_model
from transformers import TrainerCallback

from prefopt.trainer.ending.signals import TerminatedRun

pytestmark = pytest.mark.trl


class SendOrLook(TrainerCallback):
    """In the second step: SIGTERM, where somebody would notice it."""

    def __init__(self) -> None:
        self.handler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.handler = signal.getsignal(signal.SIGTERM)
            if self.handler != signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_stops() -> None:
    """TRL sets no handler: the process would end there, with what it has not saved."""
    theirs, ours = SendOrLook(), SendOrLook()
    build("trl", "dpo", {}, ref_model=tiny_model(**REFERENCE), callbacks=[theirs]).train()
    assert theirs.handler == signal.SIG_DFL
    run = build("prefopt", "dpo", {}, ref_model=tiny_model(**REFERENCE), callbacks=[ours])
    with pytest.raises(TerminatedRun) as raised:
        run.train()
    assert raised.value.code == 143
    assert raised.value.checkpoint == str(Path(run.args.output_dir, "checkpoint-2"))
    assert Path(raised.value.checkpoint, "manifest.json").is_file()


def test_a_run_leaves_its_rows() -> None:
    theirs, ours = (build(library, "dpo", {}, ref_model=tiny_model(**REFERENCE)) for library in ("trl", "prefopt"))
    names = []
    for run in (theirs, ours):
        run.train()
        names.append({path.name for path in Path(run.args.output_dir).iterdir()})
    assert names[1] - names[0] >= {"metrics.jsonl", "run.json"}
