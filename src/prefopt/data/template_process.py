"""The process in which chat templates render: at its limits of time and memory the system ends it.

A chat template is a program that comes with a model or with data. jinja2's sandbox keeps it from the interpreter, not
from running for ever or asking for all memory, and nothing within a process interrupts a single call into C (``10 **
10 ** 9``, the text of lists that hold each other). So templates render in a process forked for them, which writes no
file. Where a system cannot fork, they render in the process itself, within the sandbox alone.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["LIMITS", "Limits", "TemplateError", "TemplateLimitError", "apply_template", "end_template_process"]


@dataclass(frozen=True)
class Limits:
    """What one call of a template may take."""

    seconds: float = 10.0
    """Of a processor; by the clock 12 times that."""
    memory: int = 2**30
    """Bytes, beyond what the process has when it is forked."""
    characters: int = 2**26
    """Of one conversation."""


LIMITS = Limits()
CLOCK_FACTOR = 12
"""A process that waits for a lock takes no time of a processor; one on a busy machine takes long by the clock."""
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that go to a whole group are for the process that waits; this one ends with its pipe."""
_own = threading.local()


class TemplateError(ValueError):
    """A template failed; the message is the template's own or jinja2's."""


class TemplateLimitError(TemplateError):
    """A template took more than it may."""


def apply_template(tokenizer: Any, given: Sequence[Any], arguments: dict[str, Any]) -> Any:
    """``tokenizer.apply_chat_template(given, **arguments)`` within `LIMITS`; errors are a `TemplateError`.

    The process stays for the next call, until :func:`end_template_process` or a call for another template.

    Args:
        tokenizer: its template, special tokens and vocabulary are those of the call that forked the process.
        given: a conversation, or several.
        arguments: of ``apply_chat_template``.

    Returns:
        A text; a list of texts for several conversations; with ``return_dict`` a mapping of lists of numbers.
    """
    if not hasattr(os, "fork"):
        return _failing_as_template(tokenizer.apply_chat_template, given, arguments)
    process = getattr(_own, "process", None)
    state = (os.getpid(), getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map)
    if process is None or process.tokenizer is not tokenizer or process.state != state:
        end_template_process()
        process = _own.process = TemplateProcess(tokenizer, state, LIMITS)
    try:
        return process(given, arguments)
    except TemplateLimitError:
        end_template_process()
        raise
    except TemplateError:
        raise
    except BaseException:  # a Ctrl-C while it waits: the answer is still to come
        end_template_process()
        raise


def end_template_process() -> None:
    """End this thread's process, if it has one; the next call forks another."""
    process = getattr(_own, "process", None)
    _own.process = None
    if process is not None:
        process.close()


class TemplateProcess:
    """A forked process that renders with the template of ``tokenizer``."""

    def __init__(self, tokenizer: Any, state: tuple[Any, ...], limits: Limits) -> None:
        self.tokenizer, self.state, self.limits = tokenizer, state, limits
        self.pid = 0
        requests, self._requests = _pipe()
        self._replies, replies = _pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where there are threads
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            with suppress(BaseException):
                _serve(tokenizer.apply_chat_template, limits, requests, replies)
                status = 0
            os._exit(status)
        requests.close()
        replies.close()

    def __call__(self, given: Sequence[Any], arguments: dict[str, Any]) -> Any:
        request = pickle.dumps((given, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        clock = self.limits.seconds * CLOCK_FACTOR
        try:
            self._requests.send_bytes(request)
            if not self._replies.poll(clock):
                raise TemplateLimitError(f"it has not ended within {clock:g} s")
            reply = self._replies.recv_bytes()
        except (EOFError, OSError):
            raise TemplateLimitError(self._why_it_ended()) from None
        return _read(reply)

    def _why_it_ended(self) -> str:
        status = 0
        with suppress(ChildProcessError):  # whoever waits for all children has had it
            status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGPROF:
            return f"it takes more than {self.limits.seconds:g} s of a processor"
        return f"its process ended ({signal.Signals(number).name})" if number else "its process ended"

    def close(self) -> None:
        """End the process, whatever it does; that of another process is left alone."""
        self._requests.close()
        self._replies.close()
        if self.pid and self.state[0] == os.getpid():
            with suppress(ProcessLookupError, ChildProcessError):  # whoever waits for all children has had it
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        self.pid = 0


def _pipe() -> tuple[Connection, Connection]:
    read, write = os.pipe()
    return Connection(read, writable=False), Connection(write, readable=False)


def _serve(apply: Callable[..., Any], limits: Limits, requests: Connection, replies: Connection) -> None:
    _confine(limits, {requests.fileno(), replies.fileno()})
    while True:
        try:
            given, arguments = pickle.loads(requests.recv_bytes())  # from the process that forked this one
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        reply = _answer(apply, given, arguments, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.send_bytes(reply)


def _confine(limits: Limits, pipes: set[int]) -> None:
    """Drop what was open, and set the limits that the system keeps."""
    import resource

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in a forked process
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for descriptor in map(int, os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")):
        if descriptor > 2 and descriptor not in pipes:
            with suppress(OSError):  # that of the list itself
                os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing is written to files
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _failing_as_template(apply: Callable[..., Any], given: Any, arguments: dict[str, Any]) -> Any:
    try:
        return apply(given, **arguments)
    except MemoryError:
        raise TemplateLimitError(f"it takes more than {LIMITS.memory >> 20} MiB of memory") from None
    except Exception as error:  # a template may raise anything
        raise TemplateError(str(error) or type(error).__name__) from error


def _answer(apply: Callable[..., Any], given: Any, arguments: dict[str, Any], limits: Limits) -> bytes:
    try:
        value = _failing_as_template(apply, given, arguments)
    except TemplateError as error:
        return _message({"error": str(error), "is_limit": isinstance(error, TemplateLimitError)})
    if not isinstance(value, str | list):
        return _message({"value": {key: list(item) for key, item in value.items()}})
    texts = [value] if isinstance(value, str) else value
    longest = max(map(len, texts), default=0)
    if longest > limits.characters:
        error = f"it writes {longest:,} characters, more than the {limits.characters:,} of a conversation"
        return _message({"error": error, "is_limit": True})
    return _message({"lengths": [len(text) for text in texts], "is_one": isinstance(value, str)}, "".join(texts))


def _message(head: dict[str, Any], text: str = "") -> bytes:
    return json.dumps(head).encode() + b"\n" + text.encode("utf-8", "surrogatepass")


def _read(reply: bytes) -> Any:
    head, _, body = reply.partition(b"\n")
    answer = json.loads(head)
    if "error" in answer:
        raise (TemplateLimitError if answer["is_limit"] else TemplateError)(answer["error"])
    if "value" in answer:
        return answer["value"]
    text, start, texts = body.decode("utf-8", "surrogatepass"), 0, []
    for length in answer["lengths"]:
        texts.append(text[start : start + length])
        start += length
    return texts[0] if answer["is_one"] else texts
