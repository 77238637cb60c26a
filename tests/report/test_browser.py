"""The reports in a real browser: they render, ask for nothing, object to nothing, and fit every window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Browser, browser
from written_runs import HOSTILE, pair, rows, run, sample, write

from prefopt.report.comparison import compared_page
from prefopt.report.folder import RunFolder, read_folder
from prefopt.report.run import write_report

SECTIONS = ["diagnosis", "curves", "samples", "pairs", "data", "time", "options", "versions", "next"]
SECTIONS_OF_SEVERAL = ["runs", "results", "curves", "options", "diagnosis", "time"]
WIDTHS = (1280, 400)
"""A screen, a telephone."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def hostile_run(folder: Path, end: str = "finished") -> Path:
    """Text that is markup wherever a text can be, and words without a place to break."""
    text = f"{HOSTILE} {'w' * 500}"
    values = run(
        status=end,
        reason={"type": "ValueError", "message": text},
        method=HOSTILE,
        options={"beta": text, HOSTILE: [HOSTILE], "generate_during_eval": True},
        versions={HOSTILE: HOSTILE},
    )
    logged = rows(sets=("eval", f"eval_{HOSTILE}"))
    return write(folder, values, logged, [sample(step, text) for step in (0, 20)], [pair(1, -1.0, "worst", text)])


def look(page: Browser, path: Path, sections: list[str], num_figures: int) -> None:
    """What holds of every page in every window."""
    for width in WIDTHS:
        page.open(path, width)
        assert page.objections == []
        assert page.value("[...document.querySelectorAll('section')].map(part => part.id)") == sections
        assert page.value("document.documentElement.scrollWidth") == width
        sizes = page.value(
            "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect(), s.querySelectorAll('text')])"
            ".map(([box, words]) => [box.width, box.height, box.right, words.length])"
        )
        assert len(sizes) == num_figures
        assert all(wide > 300 and high > 200 and right <= width and words > 5 for wide, high, right, words in sizes)
        assert page.value("document.scripts.length + document.images.length") == 0
        assert page.value("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_the_report_renders(page: Browser, tmp_path: Path) -> None:
    samples, pairs = [sample(0), sample(20)], [pair(7, -1.5, "worst"), pair(8, 2.5, "best")]
    look(page, write_report(write(tmp_path / "mine", run(), rows(), samples, pairs)), SECTIONS, 6)
    assert page.value("document.title") == "DPO: mine"
    shown = page.value("document.body.innerText")
    for text in ("DPO finished after 20 optimizer steps, in 1 min 40 s.", "said at 20", "row 7", "3, 41"):
        assert text in shown


def test_hostile_text_is_text(page: Browser, tmp_path: Path) -> None:
    path = write_report(hostile_run(tmp_path / "run", "failed"))
    look(page, path, SECTIONS, 6)
    assert "<script>alert(1)</script>" in page.value("document.body.textContent")
    assert "\u202e" not in path.read_text()


def test_several_runs_render(page: Browser, tmp_path: Path) -> None:
    folders = [read_folder(hostile_run(tmp_path / str(number))) for number in range(3)]
    path = tmp_path / "comparison.html"
    path.write_text(compared_page([*folders, RunFolder("$_empty$")]))
    look(page, path, SECTIONS_OF_SEVERAL, 6)


def test_the_page_follows_the_window_to_the_dark(page: Browser, tmp_path: Path) -> None:
    path = write_report(write(tmp_path / "run", run(), rows()))
    colours = []
    for scheme in ("light", "dark"):
        page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open(path, WIDTHS[0])
        colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(21, 25, 30)"]


def test_the_browser_would_object(page: Browser, tmp_path: Path) -> None:
    """What the other tests rely on: a page that runs or fetches something is found out."""
    path = write_report(write(tmp_path / "run", run(), rows()))
    markup = '<script>console.log("ran")</script><img src="http://evil.example/x">'
    path.write_text(path.read_text().replace("</main>", f"{markup}<p style='width: 3000px'>wide</p></main>"))
    page.open(path, WIDTHS[0])
    assert len([text for text in page.objections if "Content Security Policy" in text]) == 2
    assert page.value("document.documentElement.scrollWidth") > WIDTHS[0]
