"""The live table: best first, within the terminal, lines where there is none, and a terminal left in order."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sweeps import METRIC, sweep_of, trial, write_rows

from prefopt.sweep.state import Status, Sweep
from prefopt.sweep.summary import remaining, seen
from prefopt.sweep.table import display, print_table, sparkline

HOSTILE = "05-[red]x[/red]\x1b[31m"


def terminal(width: int = 140, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Five trials: paused, the best one running, finished, failed with a hostile name, waiting."""
    for name, values in {"01": [0.5, 0.6], "02": [0.55, 0.9], "03": [0.5, 0.7]}.items():
        rows = [{"step": 5 * (place + 1), METRIC: value} for place, value in enumerate(values)]
        training = {"step": 10, "loss": 0.693147, "rewards/margins": -0.25, "rewards/accuracies": 0.75}
        write_rows(tmp_path, name, [*rows, training])
    return sweep_of(
        [
            trial("01", last=0.6),
            trial("02", Status.RUNNING, last=0.9),
            trial("03", Status.FINISHED, last=0.7, steps=40, seconds=20.0),
            trial(HOSTILE, Status.FAILED, reason="NaN \x1b[2J"),
            trial("04", Status.WAITING, steps=0, max_steps=None, seconds=0.0),
        ]
    )


def test_the_best_comes_first(tmp_path: Path, sweep: Sweep) -> None:
    console = terminal()
    print_table(tmp_path, sweep, console)
    lines = [line.split() for line in text_of(console).splitlines() if line.strip()]
    assert [line[0] for line in lines[1:4]] == ["02", "03", "01"]
    assert " ".join(lines[1]) == "02 running 10/40 0.900 ▂█ 0.693 -0.250 0.750 0.900 5 s 15 s"
    assert ["04", "waiting", "0/?"] in lines
    minimized = replace(sweep, direction="minimize")
    assert [item.trial.name for item in seen(tmp_path, minimized)][:3] == ["01", "03", "02"]


def test_what_is_left_is_added_up(tmp_path: Path, sweep: Sweep) -> None:
    """01 and 02: 30 steps at half a second; 04 has not begun: a whole run of 40 of them. 03 and 05 are over."""
    assert remaining(seen(tmp_path, sweep)) == 15.0 + 15.0 + 20.0


def test_names_and_reasons_cannot_act_on_the_terminal(tmp_path: Path, sweep: Sweep) -> None:
    for console in (terminal(), Console(file=io.StringIO(), width=200)):
        with display(tmp_path, console) as shown:
            shown.update(sweep, HOSTILE)
        text = text_of(console)
        assert "[red]x[/red]" in text
        assert "\x1b[31m" not in text
        assert "\x1b[2J" not in text


@pytest.mark.parametrize("width", [55, 60, 80, 100, 140])
def test_columns_go_before_anything_is_cut(tmp_path: Path, sweep: Sweep, width: int) -> None:
    console = terminal(width)
    print_table(tmp_path, replace(sweep, trials=sweep.trials[:3]), console)
    lines = text_of(console).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text_of(console)
    assert ("left" in lines[0]) == (width >= 100)


def test_a_low_terminal_shows_the_best(tmp_path: Path) -> None:
    many = sweep_of([trial(f"{number:03d}", last=number / 100) for number in range(100)])
    console = terminal(height=16)
    with display(tmp_path, console) as shown:
        shown.update(many)
    text = text_of(console)
    assert "099" in text
    assert "089" not in text
    assert "90 not shown" in text


def test_without_a_terminal_a_chunk_is_a_line(tmp_path: Path, sweep: Sweep) -> None:
    console = Console(file=io.StringIO(), width=30)
    with display(tmp_path, console) as shown:
        for steps in (8, 9, 10):
            shown.update(sweep.with_trial(replace(sweep.trial("02"), steps=steps)), "02")  # steps of its chunk
        for _ in range(2):
            shown.update(sweep, "01")
        shown.update(sweep, HOSTILE)
        shown.update(sweep, None)
    first, second = text_of(console).splitlines()
    assert first == f"01  paused  10/40  loss 0.693  margin -0.250  {METRIC} 0.600  5 s"
    assert second.endswith("NaN \\x1b[2J")


def test_the_terminal_is_left_in_order_by_ctrl_c(tmp_path: Path, sweep: Sweep) -> None:
    console = terminal()

    def interrupted() -> None:
        with display(tmp_path, console) as shown:
            shown.update(sweep, "01")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = text_of(console)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is hidden, and back"
    assert "paused" in text, "the last table stays"


def test_steps_alone_are_shown_now_and_then(tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred steps within a moment are one table; a trial that has finished is shown at once."""
    console = terminal()
    with display(tmp_path, console) as shown:
        monkeypatch.setattr("prefopt.sweep.table.SECONDS_BETWEEN", 1e9)
        for steps in range(100):
            shown.update(sweep.with_trial(replace(sweep.trial("02"), steps=steps)), "02")
        before = text_of(console).count("waiting")
        shown.update(sweep.with_trial(replace(sweep.trial("02"), status=Status.FINISHED)), "02")
        assert (before, text_of(console).count("waiting")) == (2, 4), "each table, and a caption with counts"


def test_sparklines_share_a_scale() -> None:
    assert sparkline({1: 0.0, 2: 0.5, 3: 1.0}, [0.0, 1.0]) == "▁▅█"
    assert sparkline({10: 0.5, 5: 0.4}, [0.0, 1.0]) == "▄▅", "by steps"
    assert sparkline({1: 0.5}, [0.5]) == "▅"
    assert sparkline({}, []) == ""
    assert len(sparkline({step: step / 50 for step in range(50)}, [0.0, 1.0])) == 16
