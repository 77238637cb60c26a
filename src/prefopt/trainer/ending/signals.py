"""Signals during ``train()``: what they ask of the run, and how a run that was asked to stop ends.

=================== ==================================================================================
signal              what the run does
=================== ==================================================================================
SIGTERM, SIGINT     a checkpoint at the next step boundary, then it stops
the second of them  stops at once, as if there was no handler
SIGUSR1             a checkpoint at the next step boundary, and it goes on
=================== ==================================================================================

A launcher passes on what the terminal or the scheduler has sent to all processes already, so signals that come within
`SAME_REQUEST` seconds are one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, ClassVar

__all__ = [
    "InterruptedRun",
    "PausedRun",
    "Request",
    "Signals",
    "TerminatedRun",
    "drop_own_handler",
    "heed_only_the_run",
    "interruption",
]

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
SAME_REQUEST = 1.0
"""Seconds."""
TO_GO_ON = "trainer.train(resume_from_checkpoint=True), or --resume_from_checkpoint true on the command line"
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Request(IntEnum):
    """What is asked of a run; the higher one holds where ranks were asked different things."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Signals:
    """The signals that a run has received."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        """The first that asked to stop."""
        self.stop_time = 0.0
        self.wants_checkpoint = False
        self.before: dict[signal.Signals, Any] = {}
        """The handlers that were there."""

    @property
    def request(self) -> Request:
        """What this process was asked."""
        if self.stop is not None:
            return Request.STOP
        return Request.SAVE if self.wants_checkpoint else Request.NOTHING

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Signals are requests within; only Python's main thread may say so, elsewhere nothing changes.

        A signal that is ignored stays ignored, and a handler of the user's is called after ours. A signal to stop that
        comes too late for the run, which ends as if there was none, then does what it does without us.
        """
        self.stop, self.wants_checkpoint, self.before = None, False, {}
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (*STOPPING, *SAVING):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: set by a library in C, and Python cannot put it back
                self.before[number] = handler
                signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        if self.stop is not None and self.before[self.stop] in DEFAULTS:  # a handler of the user's was called already
            signal.raise_signal(self.stop)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler: notes what is asked, or stops at once where it was asked before."""
        which = signal.Signals(number)
        if which in SAVING:
            self.wants_checkpoint = True
        elif self.stop is None:
            self.stop, self.stop_time = which, time.monotonic()
        elif time.monotonic() - self.stop_time >= SAME_REQUEST:
            signal.signal(which, signal.SIG_DFL)
            os.kill(os.getpid(), which)
        handler = self.before.get(which)
        if callable(handler) and handler not in DEFAULTS:
            handler(number, frame)


class Interruption(BaseException):
    """What both ends of a run that was asked to stop tell.

    Args:
        step: optimizer steps that were done.
        received: the signal.
        checkpoint: the folder to go on from; None where there is none.
        detail: more that is worth knowing.
    """

    signal: ClassVar[signal.Signals]

    def __init__(self, step: int, checkpoint: str | None, detail: str = "") -> None:
        self.step, self.checkpoint = step, checkpoint
        after = f"after step {step}" if step else "before the first step was done"
        saved = f"The checkpoint is {checkpoint}; to go on: {TO_GO_ON}." if checkpoint else "There is no checkpoint."
        self.message = " ".join(filter(None, [f"{self.signal.name} was received: stopped {after}.", detail, saved]))
        super().__init__(step, checkpoint, detail)  # what it is made with again where it is unpickled

    def __str__(self) -> str:
        return self.message


class InterruptedRun(Interruption, KeyboardInterrupt):
    """A run was stopped by SIGINT (Ctrl-C)."""

    signal = signal.SIGINT


class TerminatedRun(Interruption, SystemExit):
    """A run was stopped by SIGTERM; unless it is caught, the process ends with status 143, as after that signal."""

    signal = signal.SIGTERM

    def __init__(self, step: int, checkpoint: str | None, detail: str = "") -> None:
        super().__init__(step, checkpoint, detail)
        self.code = 128 + self.signal


class PausedRun(BaseException):
    """A run was told by ``trainer.pauses`` to save and end; with ``resume_from_checkpoint`` it goes on as if it had
    not. No ``except Exception`` of anyone's may hold it.

    Args:
        step: optimizer steps that were done.
        checkpoint: the folder to go on from.
        is_extra: whether the checkpoint is there for the pause alone, and would not have been saved without it.
    """

    def __init__(self, step: int, checkpoint: str, is_extra: bool) -> None:
        self.step, self.checkpoint, self.is_extra = step, checkpoint, is_extra
        super().__init__(f"paused after step {step}; the checkpoint is {checkpoint}")


def heed_only_the_run(worker: int) -> None:
    """For the workers of a loader: a signal to all processes of a group is not for them, as the run wants its batches.

    Torch ends a worker by SIGTERM when its loader is done; that one comes from the run.
    """
    for number in (signal.SIGINT, *SAVING):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_the_run, daemon=True).start()


def end_with_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def interruption(received: signal.Signals | None, step: int, checkpoint: str | None, detail: str = "") -> BaseException:
    """The exception with which ``train()`` ends; of a rank that got no signal itself, that of SIGTERM."""
    kind = InterruptedRun if received == signal.SIGINT else TerminatedRun
    return kind(step, checkpoint, detail)


def drop_own_handler(handler: Any) -> None:
    """Take out transformers' callback of ``enable_jit_checkpoint``, and the handler that its constructor has set.

    It would write into a checkpoint's folder by itself, three seconds after the signal.
    """
    for callback in [c for c in handler.callbacks if type(c).__name__ == "JITCheckpointCallback"]:
        handler.remove_callback(callback)
        manager = getattr(callback, "jit_manager", None)
        if manager is not None and signal.getsignal(signal.SIGTERM) == manager._sigterm_handler:
            signal.signal(signal.SIGTERM, manager._original_sigterm_handler)
