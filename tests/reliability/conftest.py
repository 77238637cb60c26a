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


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the processes of xdist send their reports to one that shows them
        config.pluginmanager.register(Figures(config), "figures")


class Figures:
    """Collects what tests found, and shows it below everything else."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            found = [value for name, value in report.user_properties if name == FIGURE]
            self.rows += [(row, text, report.outcome) for row, text in found]

    def pytest_unconfigure(self) -> None:
        if not self.rows:
            return
        writer = self.config.get_terminal_writer()
        writer.sep("=", "reliability")
        width = max(len(row) for row, _, _ in self.rows)
        for row, text, outcome in sorted(self.rows):
            writer.line(f"{row:<{width}}  {text}{'' if outcome == 'passed' else f'  [{outcome}]'}")
