"""A headless Chromium, spoken to in its own protocol over a pipe: what a page is to it, and what it objects to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


class Browser:
    """One page of a browser."""

    def __init__(self, to: int, answers: int) -> None:
        self.to, self.answers, self.rest, self.number = to, answers, b"", 0
        self.objections: list[str] = []
        """Of the page: errors of its console, broken policies, requests."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.ask(f"{domain}.enable")

    session: str | None = None

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            self.rest += os.read(self.answers, 1 << 20)
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            self.objections.append(params["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.objections.append(str(params))
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.objections.append(f"asks for {params['request']['url']}")

    def open(self, path: Path, width: int) -> None:
        """Load a file in a window of this width, in CSS pixels."""
        self.objections.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while (event := self.read()).get("method") != "Page.loadEventFired":
            self.note(event)

    def value(self, script: str) -> Any:
        """What a script finds in the page; the debugger's, which the page's policy does not concern."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser without network, or a skipped test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    commands, to = os.pipe()
    answers, replies = os.pipe()

    def wire() -> None:
        """Chromium reads commands from descriptor 3 and answers on 4."""
        ends = os.dup(commands), os.dup(replies)  # 3 may be one of them
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "--proxy-server=127.0.0.1:9"]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "close_fds": False}
    process = subprocess.Popen([program, *flags], preexec_fn=wire, start_new_session=True, **options)
    os.close(commands)
    os.close(replies)
    try:
        page = Browser(to, answers)
        yield page
        page.session = None
        page.ask("Browser.close")
    finally:
        os.close(to)
        os.close(answers)
        process.terminate()
        process.wait(timeout=20)
