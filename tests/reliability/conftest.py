"""The figures of the reliability tests, shown in one table after them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

FIGURE = "figure"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``figure(row, text)``: what a test found, for the table."""

    def record(row: str, text: str) -> None:
        request.node.user_properties.append((FIGURE, (row, text)))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group if hasattr(report, "nodeid")]
    rows = [
        (value[0], value[1], report.outcome)
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == FIGURE
    ]
    if rows:
        terminalreporter.section("reliability")
        width = max(len(row) for row, _, _ in rows)
        for row, text, outcome in sorted(rows):
            terminalreporter.line(f"{row:<{width}}  {text}{'' if outcome == 'passed' else f'  [{outcome}]'}")
