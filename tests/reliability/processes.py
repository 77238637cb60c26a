"""Processes that are to be killed: forked from one that has everything imported, so that each starts at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = ["runs", "peft", "prefopt.trainer.dpo", "prefopt.trainer.cpo", "prefopt.trainer.tpo"]


@cache
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(target: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
    """A process that calls ``target``, a function at the top of a module of the tests.

    ``start(..).kill()`` is kill -9; ``exitcode`` is the negative number of the signal.
    """
    process = server().Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process
