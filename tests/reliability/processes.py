"""Processes that are to be killed: forked from one that has everything imported, so that each starts at once."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = ["peft", "prefopt.trainer.dpo", "prefopt.trainer.cpo", "prefopt.trainer.tpo"]


@cache
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(target: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
    """A process that calls ``target``, a function at the top of a module of the tests.

    ``start(..).kill()`` is kill -9; ``exitcode`` is the negative number of the signal.
    """
    process = server().Process(target=forking, args=(target, *args), kwargs=kwargs)
    process.start()
    return process


def forking(target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``target`` as a script of its own would run it: the workers of its loaders are forked from it.

    The imports are set aside, so that a run, which begins with a search for garbage, does not begin with a third of a
    second.
    """
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
    multiprocessing.set_start_method("fork", force=True)
    target(*args, **kwargs)
