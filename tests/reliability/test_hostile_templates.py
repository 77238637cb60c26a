"""Chat templates that are programs of somebody else: none gets out, runs for long or takes all memory."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from scale import LONG
from tiny_models import CHAT_TEMPLATE, word_tokenizer
from transformers import AutoTokenizer

from prefopt.data import PrepareOptions, prepare_dataset, template_process
from prefopt.data.template_process import Limits, TemplateLimitError

LIMITS = Limits(seconds=0.2, memory=2**28, characters=2**20)
SLACK = 20.0
"""Seconds by the clock for one payload: its limit, forking, and a busy machine."""
OUT = "__class__.__mro__[-1].__subclasses__()"

GETS_OUT = {
    "class walk": "{{ ''." + OUT + " }}",
    "class walk by attr": "{{ (''|attr('__class__')|attr('__mro__'))[-1] }}",
    "class walk by item": "{{ ''['__class__']['__mro__'] }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch OWNED').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch OWNED') }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('touch OWNED') }}",
    "self": "{{ self._TemplateReference__context.environment.loader.x }}",
    "self init": "{{ self.__init__.__globals__.__builtins__.open('OWNED', 'w') }}",
    "raise_exception": "{{ raise_exception.__globals__['os'].system('touch OWNED') }}",
    "strftime_now": "{{ strftime_now.__globals__['os'].system('touch OWNED') }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__.os.system('touch OWNED') }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals.os.system('touch OWNED') }}",
    "format": "{{ '{0.__init__.__globals__[os]}'.format(cycler) }}",
    "format_map": "{{ '{x.__class__.__mro__[0]}'.format_map({'x': 1}) }}",
    "changed data": "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch OWNED') }}",
    "extends": "{% extends '/etc/passwd' %}",
}
"""What would leave the sandbox."""
TAKES_ALL = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "text times": "{{ 'a' * 10 ** 9 }}",
    "text times, hidden": "{% set n = messages|length * 10 ** 10 %}{{ 'a' * n }}",
    "list times": "{{ ([1] * 10 ** 9)|length }}",
    "doubled": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "centred": "{{ 'a'|center(10 ** 10) }}",
    "formatted": "{{ '%9999999999d' % 1 }}",
    "justified": "{{ 'a'.ljust(10 ** 10) }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "tower": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    ),
    "hashed tower": (
        "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
        "{{ {ns.x: 1}|length }}"
    ),
    "macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "much text": "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lorem": "{{ lipsum(n=10 ** 7) }}",
}
"""What would take all time or memory."""
PAYLOADS = {**GETS_OUT, **TAKES_ALL}


SAMPLE = ("lipsum", "nested loops", "power", "centred")
"""Payloads for the ways that are rarer: out, and too long in Python, in C, and in memory."""
USER = {"role": "user", "content": "baba"}
SAID, OTHER = {"role": "assistant", "content": "dada"}, {"role": "assistant", "content": "fafa"}
ROW: dict[str, Any] = {"prompt": [USER], "chosen": [SAID], "rejected": [OTHER]}
OPTIONS = PrepareOptions(("chosen", "rejected"), 64, "keep_start")


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(template_process, "LIMITS", LIMITS)
    monkeypatch.chdir(tmp_path)
    template_process.end_template_process()
    yield
    template_process.end_template_process()


def from_folder(template: str) -> None:
    """The file that comes with a model."""
    word_tokenizer().save_pretrained("model")
    Path("model", "chat_template.jinja").write_text(template, encoding="utf-8")
    prepare_dataset(Dataset.from_list([ROW]), AutoTokenizer.from_pretrained("model"), OPTIONS, name="train")


def from_row(template: str) -> None:
    row = {**ROW, "chat_template_kwargs": {"chat_template": template}}
    prepare_dataset(Dataset.from_list([row]), word_tokenizer(), OPTIONS, name="train")


def for_tools(template: str) -> None:
    """One of several templates, taken for rows with tools."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": template}
    row = {**ROW, "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]}
    prepare_dataset(Dataset.from_list([row]), tokenizer, OPTIONS, name="train")


def with_markers(template: str) -> None:
    """One that says which tokens are the assistant's; it goes bad where they are asked for."""
    tokenizer = word_tokenizer()
    marked = "{% if messages[0].content == 'baba' and messages|length == 3 and calls == 2 %}" + template + "{% endif %}"
    tokenizer.chat_template = marked + CHAT_TEMPLATE + "{% generation %}{% endgeneration %}"
    row = {**ROW, "chosen": [SAID, USER], "chat_template_kwargs": {"calls": 2}}
    prepare_dataset(Dataset.from_list([row]), tokenizer, OPTIONS, name="train")


def of_stream(template: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    stream: Any = prepare_dataset(IterableDataset.from_generator(lambda: iter([ROW])), tokenizer, OPTIONS, name="train")
    list(stream)


def in_workers(template: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    options = PrepareOptions(("chosen", "rejected"), 64, "keep_start", num_proc=2)
    prepare_dataset(Dataset.from_list([ROW, ROW]), tokenizer, options, name="train")


def of_encoder_decoder(template: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    options = PrepareOptions(("chosen", "rejected"), 64, "keep_start", max_completion_length=8)
    prepare_dataset(Dataset.from_list([ROW]), tokenizer, options, name="train")


WAYS: dict[str, Callable[[str], None]] = {
    "folder": from_folder,
    "row": from_row,
    "tools": for_tools,
    "markers": with_markers,
    "stream": of_stream,
    "workers": in_workers,
    "encoder-decoder": of_encoder_decoder,
}


def is_run(way: str, payload: str) -> bool:
    return LONG or way == "folder" or payload in SAMPLE


CASES = [(way, payload) for way in WAYS for payload in PAYLOADS if is_run(way, payload)]


@pytest.mark.parametrize(("way", "payload"), CASES)
def test_no_template_gets_out_or_takes_all(way: str, payload: str) -> None:
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"train data, row \d, column '\w+': the chat template failed: .*the template \("
    ):
        WAYS[way](PAYLOADS[payload])
    assert time.monotonic() - start < SLACK
    assert not Path("OWNED").exists()


def test_the_figure_of_payloads(figure: Callable[[str, str], None]) -> None:
    assert len(PAYLOADS) >= 30
    figure("hostile templates", f"{len(PAYLOADS)} payloads, {len(WAYS)} ways they reach us, {len(CASES)} cases blocked")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no limit of a process's memory")
def test_memory_is_limited_where_time_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "LIMITS", Limits(memory=2**27))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ ('a' * 2 * 10 ** 8)|length }}"
    with pytest.raises(TemplateLimitError, match="it takes more than 128 MiB of memory"):
        template_process.apply_template(tokenizer, [USER], {"tokenize": False})


def test_the_process_ends_with_the_preparation_and_goes_with_the_template() -> None:
    tokenizer = word_tokenizer()
    prepared: Any = prepare_dataset(Dataset.from_list([ROW]), tokenizer, OPTIONS, name="train")
    assert getattr(template_process._own, "process", None) is None
    conversation = [USER, SAID]
    given = {"tokenize": False}
    first = template_process.apply_template(tokenizer, conversation, given)
    process = template_process._own.process
    assert template_process.apply_template(tokenizer, [conversation] * 2, given) == [first] * 2
    assert template_process._own.process is process
    tokenizer.chat_template = "other"
    assert template_process.apply_template(tokenizer, conversation, given) == "other"
    assert template_process._own.process is not process
    assert len(prepared) == 1


class Lists:
    """Its template writes what is open."""

    chat_template, special_tokens_map = "", ()

    def apply_chat_template(self, given: Any, **arguments: Any) -> str:
        return " ".join(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_the_process_has_no_file_of_ours_whatever_its_number(tmp_path: Path) -> None:
    """Also one that was opened before the limit of their number came to be lower."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "secret", "w") as file:
        high = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, soft - 10)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 20, hard))
        opened = template_process.apply_template(Lists(), [], {}).split()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(high)
    assert len(set(opened) - {"0", "1", "2"}) == 3  # two pipes, and the list itself
    assert str(high) not in opened


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there is no such signal")
def test_a_process_that_nobody_may_wait_for_is_an_error_of_the_template() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = TAKES_ALL["power"]
        with pytest.raises(TemplateLimitError, match="its process ended"):
            template_process.apply_template(tokenizer, [USER], {"tokenize": False})
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800 lone", "é\u2028漢字", "a" * 300_000, ""], ids=["nul", "surrogate", "wide", "long", "empty"]
)
def test_texts_come_back_as_they_are(text: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert template_process.apply_template(tokenizer, [{**USER, "content": text}], {"tokenize": False}) == text
