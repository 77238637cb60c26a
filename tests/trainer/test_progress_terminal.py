"""The display on a terminal: a pseudo-terminal in this process, which takes what is written to it."""

from __future__ import annotations

import logging
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from short_runs import dataset, trainer
from transformers import TrainerCallback

from prefopt.trainer.ending.signals import InterruptedRun
from prefopt.trainer.progress.display import Display, display_for, has_terminal
from prefopt.trainer.progress.screen import SCREEN, stream_handlers

SHOWN: dict[str, Any] = {"disable_tqdm": False}
CURSOR_SHOWN, CURSOR_HIDDEN = "\x1b[?25h", "\x1b[?25l"


class Terminal:
    """What was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.parts: list[bytes] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:
                return
            if not part:
                return
            self.parts.append(part)

    def text(self) -> str:
        """All of it; the terminal is closed."""
        os.close(self.slave)
        self.reader.join(timeout=10)
        os.close(self.master)
        return b"".join(self.parts).decode()


@contextmanager
def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Terminal]:
    """Standard streams that are a terminal meanwhile, and a logger whose handler has taken hold of one."""
    terminal = Terminal()
    for variable, value in (("TERM", "xterm"), ("COLUMNS", "150"), ("LINES", "40")):
        monkeypatch.setenv(variable, value)
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch, os.fdopen(os.dup(terminal.slave), "w", buffering=1) as stream:
        for name in names or ("stdout", "stderr"):
            patch.setattr(sys, name, stream)
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("someone")
        logger.addHandler(handler)
        streams = sys.stdout, sys.stderr
        try:
            yield terminal
        finally:
            logger.removeHandler(handler)
            left = SCREEN.live, SCREEN.parts, SCREEN.moved
            now = sys.stdout, sys.stderr, handler.stream
    assert left == (None, [], [])
    assert now == (*streams, streams[1])


def plain(written: str) -> str:
    """Without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)


class Speaks(TrainerCallback):
    """Writes to the terminal in every way there is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"printed {state.global_step} [/red] [bold]")
        print(f"at length {state.global_step} {'/a/long/path' * 20}")
        logging.getLogger("someone").warning("logged %d", state.global_step)
        sys.stderr.write(f"written {state.global_step}\n")


def test_a_run_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars with numbers; what others write stands on lines of its own; the cursor is there at the end."""
    with on_a_terminal(monkeypatch) as terminal:
        options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "callbacks": [Speaks()]}
        run = trainer(tmp_path, eval_dataset=dataset(5), **options, **SHOWN)
        run.train()
        trainer(tmp_path / "second", max_steps=1, **SHOWN).train()
    written = terminal.text()
    assert written.rfind(CURSOR_SHOWN) > written.rfind(CURSOR_HIDDEN) >= 0
    shown = plain(written)
    assert re.search(r"training \d/4 steps ━+ .*(pairs/s)?.*[MG]iB", shown)
    assert "evaluation 0/5 pairs" in shown
    lines = [line.strip() for line in shown.replace("\r", "\n").split("\n")]
    for step in range(1, 5):
        whole = f"at length {step} {'/a/long/path' * 20}"
        for line in (f"printed {step} [/red] [bold]", whole, f"logged {step}", f"written {step}"):
            assert line in lines
    assert sum(line.startswith("training: ") for line in lines) == 2
    assert sum(line.startswith("step 4/4  loss") for line in lines) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InterruptedRun])
def test_the_terminal_is_left_in_order(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a failure in a step, a bare Ctrl-C, and the one that the run heeds, in the midst of an evaluation."""

    class Ends(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if error is not InterruptedRun:
                raise error("planted")
            os.kill(os.getpid(), 2)

    with on_a_terminal(monkeypatch) as terminal:
        options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "callbacks": [Ends()]}
        run = trainer(tmp_path, eval_dataset=dataset(40), **options, **SHOWN)
        with pytest.raises(error):
            run.train()
        assert run.own_display.open == []
    written = terminal.text()
    assert written.rfind(CURSOR_SHOWN) > written.rfind(CURSOR_HIDDEN) >= 0
    assert re.search(r"training: [01] of 4 steps in", plain(written))


def test_the_cursor_is_visible_while_bars_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed has no time to bring it back."""
    with on_a_terminal(monkeypatch) as terminal, Display(print, SCREEN).part("training", 1, "steps"):
        os.write(terminal.slave, b"killed here")
    before = terminal.text().split("killed here")[0]
    assert before.rfind(CURSOR_SHOWN) > before.rfind(CURSOR_HIDDEN) >= 0


def test_lines_go_to_a_file_where_standard_output_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with on_a_terminal(monkeypatch, "stderr") as terminal:
        shown = Display(print, SCREEN)
        with shown.part("training", 1, "steps"):
            shown.line("step 1/1")
    assert capsys.readouterr().out.startswith("step 1/1\ntraining: 0 of 1 steps in")
    assert "step 1/1" not in terminal.text()


def test_a_forked_process_writes_as_if_there_were_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a loader has no drawing thread, and must not wait for a lock that this one held."""
    read, write = os.pipe()
    with on_a_terminal(monkeypatch) as terminal, Display(print, SCREEN).part("training", 1, "steps"):
        proxied = sys.stderr
        own = [handler.stream for handler in stream_handlers()]
        if (child := os.fork()) == 0:
            streams = [sys.stderr, sys.stdout, *(handler.stream for handler in stream_handlers())]
            os.write(write, b"bad" if SCREEN.live or any(stream is proxied for stream in streams) else b"good")
            os._exit(0)
        os.waitpid(child, 0)
        assert any(stream is proxied for stream in own), "the parent goes on"
    assert os.read(read, 10) == b"good"
    assert terminal.text()


def test_bars_need_a_terminal_that_can_go_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = trainer(tmp_path, **SHOWN).args
    assert not has_terminal(), "none under pytest"
    assert display_for(args).screen is None
    with on_a_terminal(monkeypatch) as terminal:
        assert has_terminal()
        assert display_for(args).screen is SCREEN
        monkeypatch.setenv("TERM", "dumb")
        assert not has_terminal()
    terminal.text()
