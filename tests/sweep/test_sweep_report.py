"""The page over all trials: whole in one file, small whatever the sweep, and nothing in it acts."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report.browsing import browser
from sweeps import METRIC, sweep_of, trial, write_rows

from prefopt.report.run import LARGEST
from prefopt.sweep.overview import Overview, importances, page
from prefopt.sweep.state import Status, Sweep, trial_folder

SCRIPT = "<script>alert(1)</script>"


def swept(folder: Path, num_trials: int, num_rows: int = 8) -> Sweep:
    """Trials whose metric depends on the learning rate alone, with rows of training and evaluation."""
    trials = []
    for number in range(num_trials):
        rate = 10 ** (-6 + 3 * number / num_trials)
        options = {"learning_rate": rate, "beta": [0.1, 0.5][number % 2], "loss_type": ["sigmoid", SCRIPT]}
        last = 0.9 - abs(math.log10(rate) + 4.5) / 10
        name = f"{number:03d}-lr"
        values = {step: 0.5 + (last - 0.5) * step / num_rows for step in range(1, num_rows + 1)}
        rows: list[dict[str, Any]] = [
            {"step": step, "loss": 0.7 - step / 1e5, "rewards/margins": step / 10, METRIC: value}
            for step, value in values.items()
        ]
        write_rows(folder, name, rows)
        trials.append(trial(name, Status.FINISHED, last, options=options, steps=num_rows))
    return sweep_of(trials)


def test_the_page_has_all_of_the_sweep(tmp_path: Path) -> None:
    sweep = swept(tmp_path, 10)
    failed = trial("010-lr", Status.FAILED, options={"learning_rate": 1.0}, reason=f"the loss is nan {SCRIPT} \x1b[31m")
    pruned = trial("011-lr", Status.PRUNED, 0.2, options={"learning_rate": 2.0}, reason="asha: 0.2 at step 10")
    clone = trial("012-lr", Status.PAUSED, 0.3, options={"beta": 0.3}, cloned_from="003-lr", clone_step=5)
    for one in (failed, pruned, clone):
        sweep = sweep.with_trial(one)
    (trial_folder(tmp_path, "005-lr") / "report.html").write_text("its own")
    text = page(tmp_path, sweep)
    names = re.findall(r'<td class="name">(?:<a href="[^"]+">)?(\d\d\d)-lr', text)
    assert names[:3] == ["005", "004", "006"], "best first: 10^-4.5 is number 5"
    assert names[10:13] == ["012", "011", "010"]
    assert '<a href="trials/005-lr/report.html">005-lr</a>' in text
    assert text.count("trials/") == 1, "no link to what is not there"
    for says in (
        f"Best {METRIC}: 0.900, by 005-lr",
        "asha: 0.2 at step 10",
        "the loss is nan &lt;script&gt;",
        "\\x1b[31m",
        "cloned from 003-lr at step 5",
        "What matters",
        "default-src 'none'",
    ):
        assert says in text
    assert "<script" not in text
    assert text.count("<svg") == 3 + 3, "metric, loss, margin; learning_rate, beta, loss_type"


def test_a_page_of_many_trials_is_small(tmp_path: Path) -> None:
    sweep = swept(tmp_path, 60, num_rows=400)
    long = trial("long", options={f"option_{number}": "x" * 5000 for number in range(40)}, reason="y" * 5000)
    sweep = sweep_of([*sweep.trials, long, *(trial(f"{number}", last=0.1) for number in range(600))])
    text = page(tmp_path, sweep)
    assert len(text.encode()) < LARGEST
    assert "161 more trials are not shown" in text
    assert text.count('<td class="name">') == 500
    assert "Not shown: " in text


def test_what_matters_is_found(tmp_path: Path) -> None:
    sweep = swept(tmp_path, 16)
    found = importances(sweep, ["learning_rate", "beta"])
    assert list(found) == ["learning_rate", "beta"]
    assert found["learning_rate"] > 0.8
    by_beta = [replace(one, last=one.options["beta"] + place / 1000) for place, one in enumerate(sweep.trials)]
    assert list(importances(sweep_of(by_beta), ["learning_rate", "beta"])) == ["beta", "learning_rate"]
    assert importances(sweep_of(list(sweep.trials[:7])), ["learning_rate", "beta"]) == {}, "too few"
    assert "share of the differences" in page(tmp_path, sweep)


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    text = page(
        tmp_path, sweep_of([trial("01", Status.WAITING, options={"beta": 0.1}), trial("02", options={"beta": 1})])
    )
    assert "No trial has been evaluated yet." in text
    assert "<svg" not in text


def test_the_page_is_written_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_REPORT", "on")
    sweep, written = swept(tmp_path, 2), []
    monkeypatch.setattr("prefopt.sweep.overview.page", lambda folder, sweep: "")
    monkeypatch.setattr("prefopt.sweep.overview.replace_file", lambda path, text: written.append(path))
    overview = Overview(tmp_path)
    for _ in range(5):
        overview.update(sweep)
    assert len(written) == 1
    overview.update(sweep, is_over=True)
    assert written == [tmp_path / "report.html"] * 2


def test_the_page_is_made_again_by_the_command_for_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli.main import main
    from prefopt.sweep.state import write_sweep

    write_sweep(tmp_path, swept(tmp_path, 2))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.replace("\n", "") == f"written: {tmp_path / 'report.html'}"
    assert "Sweep of 2 DPO trials" in (tmp_path / "report.html").read_text()


def test_a_page_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFOPT_REPORT", "on")
    monkeypatch.setattr("prefopt.sweep.overview.page", lambda folder, sweep: 1 / 0)
    Overview(tmp_path).update(swept(tmp_path, 2))
    assert "report.html was not written: ZeroDivisionError" in caplog.text


def test_a_trial_that_was_given_up_has_its_own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_REPORT", "on")
    sweep = swept(tmp_path, 2)
    sweep = sweep.with_trial(trial("001-lr", Status.PRUNED, 0.6, options={"beta": 0.5}))
    Overview(tmp_path).update(sweep)
    assert (trial_folder(tmp_path, "001-lr") / "report.html").is_file()
    assert not (trial_folder(tmp_path, "000-lr") / "report.html").is_file(), "a run that ends writes its own"
    assert "trials/001-lr/report.html" in (tmp_path / "report.html").read_text()


def test_a_browser_has_no_objection(tmp_path: Path) -> None:
    """On a screen and on a telephone: nothing overflows, nothing is asked for, and every picture has a size."""
    sweep = swept(tmp_path, 10)
    failed = trial("010-lr", Status.FAILED, options={"learning_rate": 1.0}, reason=f"{SCRIPT} {'w' * 500}")
    (tmp_path / "report.html").write_text(page(tmp_path, sweep.with_trial(failed)))
    with browser(tmp_path / "profile") as shown:
        for width in (1280, 400):
            shown.open(tmp_path / "report.html", width)
            assert shown.objections == []
            sections = shown.value("[...document.querySelectorAll('section')].map(part => part.id)")
            assert sections == ["trials", "curves", "options", "ended"]
            assert shown.value("document.documentElement.scrollWidth") == width
            boxes = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())"
            sizes = shown.value(f"{boxes}.map(box => [box.width, box.height, box.right])")
            assert len(sizes) == 6
            assert all(wide > 250 and high > 120 and right <= width for wide, high, right in sizes)
            assert shown.value("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
            assert SCRIPT in shown.value("document.body.textContent")
