"""The report of a run, and of several, from files that were written by hand."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from written_runs import HOSTILE, pair, rows, run, sample, write

from prefopt.cli.main import main
from prefopt.report.comparison import MOST_RUNS, compared_page, metric_table, option_table
from prefopt.report.curves import MOST_POINTS, PANELS, draw, evaluations, thinned
from prefopt.report.folder import RunFolder, read_folder, read_rows
from prefopt.report.run import LARGEST, fitting, run_page, write_report
from prefopt.report.summary import (
    MOST_ROWS,
    data_rows,
    metric_rows,
    option_rows,
    results,
    skipped_rows,
    timing_rows,
    verdict,
)

SECONDS_OF_A_PAGE = 20
"""Of 100,000 rows; two or three where nothing else runs."""

# -- sentences and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "level", "sentence"),
    [
        ({}, "good", "DPO finished after 20 optimizer steps, in 1 min 40 s."),
        (
            {"status": "failed", "steps": 7, "reason": {"type": "ValueError", "message": "row 3"}},
            "bad",
            "DPO failed after 7 optimizer steps, in 1 min 40 s. ValueError: row 3",
        ),
        (
            {"status": "interrupted", "ended": None, "reason": {"type": "InterruptedRun", "message": "SIGINT"}},
            "warn",
            "DPO was interrupted after 20 optimizer steps. InterruptedRun: SIGINT",
        ),
        ({"status": "paused", "ended": None}, "warn", "DPO is paused after 20 optimizer steps."),
    ],
    ids=["finished", "failed", "interrupted", "paused"],
)
def test_how_a_run_ended(values: dict, level: str, sentence: str) -> None:
    assert verdict(RunFolder("x", run(**values))) == (level, sentence)


def test_a_run_that_went_on_names_the_steps_that_its_time_is_of() -> None:
    timing = {**run()["timing"], "steps": 4}
    _, sentence = verdict(RunFolder("x", run(timing=timing)))
    assert sentence == "DPO finished after 20 optimizer steps, the last 4 of them in 1 min 40 s."


def test_a_run_that_was_killed_left_no_last_word() -> None:
    level, sentence = verdict(RunFolder("x", run(status="running", steps=0, ended=None), rows(7)))
    assert level == "warn"
    assert "still runs, or was killed" in sentence
    assert "logged: 7. Last row: 2026-05-04 12:00:00 UTC." in sentence


def test_the_last_and_the_lowest_loss_are_named() -> None:
    logged = [
        {"step": step, "eval_loss": loss, "eval_nll_loss": 9.0, "eval_rewards/margins": 0.5}
        for step, loss in ((5, 0.6), (10, 0.2), (15, None), (20, 0.3))
    ]
    assert results(RunFolder("x", {}, logged)) == ["eval: loss 0.3 at the end (lowest 0.2 at step 10)."]
    two = rows(sets=("eval_one", "eval_two"))
    assert [line.split(":")[0] for line in results(RunFolder("x", {}, two))] == ["eval_one", "eval_two"]
    assert results(RunFolder("x", {}, rows(sets=()))) == [
        "training: loss 0.3 at the end, its lowest; reward accuracy 90.0%, margin 2."
    ]
    assert results(RunFolder("x", {}, [])) == []


def test_tables() -> None:
    known = run()
    assert option_rows(known, were_set=True) == [["beta", "0.1"]]
    assert [name for name, _ in option_rows(known, were_set=False)] == ["learning_rate", "seed", "generate_during_eval"]
    assert data_rows(known["data"]) == [["train", "trl-lib/some", "100", "98 (98.0%)", "7 (7.0%)"]]
    assert skipped_rows(known["data"]) == [["train", "chosen equal to rejected", "2", "3, 41"]]
    assert timing_rows(known["timing"]) == [
        ["training steps", "1 min 20 s (80%)"],
        ["evaluation, with samples", "20.0 s (20%)"],
        ["steps per second of training", "0.25"],
        ["pairs per second of training", "2"],
        ["tokens per second of training", "100"],
        ["most memory of the process", "1.00 GiB"],
    ]
    assert ["loss", "0.68", "0.3", "0.3 (step 20)", "0.68 (step 1)"] in metric_rows(rows())


def test_long_tables_say_what_they_leave_out() -> None:
    options = {f"option_{number}": number for number in range(MOST_ROWS + 30)}
    assert option_rows({"options": options}, were_set=False)[-1] == ["30 more", ""]


# -- curves ------------------------------------------------------------------------------------------------------------


def test_a_thinned_line_keeps_its_spikes_and_its_gaps() -> None:
    num = 10 * MOST_POINTS
    values = [1 + (step % 7) / 10 for step in range(num)]
    values[1234], values[3000] = 50.0, -50.0
    values[2000:2100] = [math.nan] * 100
    steps, kept = thinned(list(range(num)), values)
    assert len(steps) <= MOST_POINTS
    assert steps == sorted(steps)
    assert dict(zip(steps, kept, strict=True)).items() >= {1234: 50.0, 3000: -50.0}.items()
    assert any(2000 <= step < 2100 and math.isnan(value) for step, value in zip(steps, kept, strict=True))
    assert all(value == values[step] for step, value in zip(steps, kept, strict=True) if not math.isnan(value))


def test_the_loss_of_a_term_is_no_evaluation_set() -> None:
    logged = [{"step": 1, "eval_loss": 1.0, "eval_nll_loss": 2.0, "eval_rewards/margins": 0.0}]
    assert evaluations(logged, "loss") == [("eval", "eval_loss")]


def test_a_line_that_never_was_a_number_is_drawn_as_a_gap() -> None:
    logged = [{"step": step, "loss": None, "not_finite": {"loss": "nan"}} for step in range(1, 5000)]
    figure = draw(logged)
    assert len(figure.axes) == len(PANELS)
    assert len(figure.axes[0].get_lines()[-1].get_xdata()) <= 40


# -- the folder --------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", run(), rows(4), [sample(0)], [pair(1, 0.5, "best")])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('3\n"text"\n{"no": "step"}\n{"step": 9, "lo')
    found = read_folder(folder)
    assert (found.name, len(found.rows), len(found.samples), len(found.pairs)) == ("a", 4, 1, 1)
    without = run(options={"generate_during_eval": False})
    (folder / "run.json").write_text(json.dumps(without))
    assert read_folder(folder).samples == []  # they are those of a run before it


def test_a_run_of_trl_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": rows(step)}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    found = read_folder(tmp_path)
    assert max(row["step"] for row in found.rows) == 10
    assert verdict(found) == ("warn", "A run without run.json: 10 optimizer steps were logged.")
    assert "Nothing was logged" not in run_page(found)


# -- size --------------------------------------------------------------------------------------------------------------


def test_a_long_run_makes_a_small_page() -> None:
    logged = rows(100_000, ["eval_one", "eval_two"], every=100)
    start = time.process_time()
    page = run_page(RunFolder("x", run(), logged))
    assert time.process_time() - start < SECONDS_OF_A_PAGE
    assert len(page.encode()) < LARGEST


def test_many_long_and_hostile_texts_make_a_small_page() -> None:
    text = HOSTILE + "&" * 20_000
    sets = [f"eval_{number}" for number in range(12)]
    samples = [sample(step, text, of) for of in sets for step in (0, 20) for _ in range(5)]
    pairs = [pair(1, 0.1, end, text, of) for of in sets for end in ("worst", "best") for _ in range(8)]
    values = run(options={f"{HOSTILE}{number}": text for number in range(2000)})
    page = run_page(RunFolder("x", values, rows(20, sets), samples, pairs))
    assert len(page.encode()) < LARGEST
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page


def test_texts_are_cut_until_the_page_is_small_enough() -> None:
    """Bytes count, not characters."""
    asked: list[int] = []

    def render(longest: int) -> str:
        asked.append(longest)
        return "é" * longest * 2000

    assert len(fitting(render).encode()) == 2 * 300 * 2000
    assert asked == [1500, 300]


def test_a_page_of_nothing(tmp_path: Path) -> None:
    path = write_report(write(tmp_path / "run", run(status="failed", data={}, timing={}, options={}, versions={})))
    assert "Nothing was logged." in path.read_text()


# -- several runs ------------------------------------------------------------------------------------------------------


def test_what_differs_is_shown_and_nothing_else() -> None:
    one = RunFolder("one", run(), rows())
    two = RunFolder("two", run(options={"beta": 0.5, "learning_rate": 1e-5, "seed": 42, "output_dir": "x"}), rows())
    assert option_table([one, two]) == [["beta", "0.1", "0.5"], ["generate_during_eval", "true", "-"]]
    assert option_table([one, one]) == []


def test_results_stand_beside_each_other() -> None:
    falling, rising = (
        [{"step": step, "eval_loss": loss, "eval_rewards/margins": 1.0} for step, loss in losses]
        for losses in (((1, 0.5), (2, 0.1)), ((1, 0.4), (2, 0.9)))
    )
    table = {row[0]: row[1:] for row in metric_table([falling, rising, []])}
    assert table["eval: lowest loss"] == ["0.1 (step 2)", "0.4 (step 1)", "-"]
    assert table["eval: loss"] == ["0.1", "0.9", "-"]


def test_runs_of_one_name_are_told_apart() -> None:
    page = compared_page([RunFolder("same", run(), rows()), RunFolder("same", run(), rows())])
    assert "1 same" in page
    assert "2 same" in page


# -- files that are damaged --------------------------------------------------------------------------------------------


ODD = [None, 7, "text", [1, "a", None], {"a": None}, {"a": {"b": [None]}}]
"""Of other kinds than a run writes."""


@pytest.mark.parametrize("place", ["all", "entries", "entries of these"])
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_strange_record_makes_a_page(tmp_path: Path, place: str, odd: object) -> None:
    """Each value of ``run.json``, at every depth, replaced by something else."""

    def replaced(value: object, depth: int) -> object:
        within = depth and isinstance(value, dict)
        return {key: replaced(item, depth - 1) for key, item in value.items()} if within else odd

    depth = ["all", "entries", "entries of these"].index(place) + 1
    record = {**run(), **{key: replaced(value, depth - 1) for key, value in run().items()}}
    page = run_page(read_folder(write(tmp_path / "mine", record, rows())))
    assert "Options" in page
    assert "<svg" in page
    compared_page([read_folder(tmp_path / "mine")] * 2)


def test_a_step_that_is_no_number_is_no_row(tmp_path: Path) -> None:
    write(tmp_path / "mine", run(), [*rows(6), {"step": math.nan, "loss": 0.5}, {"step": math.inf, "loss": 0.5}])
    assert [row["step"] for row in read_folder(tmp_path / "mine").rows] == [1, 2, 3, 4, 5, 5, 6]
    assert "<svg" in run_page(read_folder(tmp_path / "mine"))


def test_a_line_that_ends_within_a_letter_is_none(tmp_path: Path) -> None:
    whole, torn = (json.dumps({"step": step, "policy": "\u00fc\u00e4"}, ensure_ascii=False) for step in (1, 2))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(f"{whole}\n{torn}".encode()[:-3])
    assert [row["step"] for row in read_rows(path)] == [1]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_a_run(tmp_path: Path, capsys) -> None:
    folder = write(tmp_path / "mine", run(), rows())
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "mine: DPO finished after 20 optimizer steps" in said
    assert "eval: loss 0.3 at the end" in said
    assert "<h1>DPO: mine</h1>" in (folder / "report.html").read_text()


def test_the_command_compares_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    folders = [str(write(tmp_path / name, run(), rows())) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders]) == 0
    assert "<h1>2 runs</h1>" in (tmp_path / "comparison.html").read_text()
    assert main(["report", *folders, "--html", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "neither run.json, metrics.jsonl nor a checkpoint"),
        (["mine"] * (MOST_RUNS + 1), f"at most {MOST_RUNS}"),
        (["mine", "--html", "no/such/folder.html"], "no/such/folder.html cannot be written"),
        (["binary"], "binary/metrics.jsonl has no line that is JSON"),
    ],
    ids=["no folder", "no run", "too many", "no place", "binary"],
)
def test_the_command_says_what_to_mend(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    write(tmp_path / "mine", run(), rows())
    (write(tmp_path / "binary", run()) / "metrics.jsonl").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
