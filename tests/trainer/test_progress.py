"""What is shown of a run: in lines where there is no terminal, and to whom."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from short_runs import dataset, trainer
from test_host_reads import reads
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from prefopt.report.diagnosis import Finding
from prefopt.terminal import without_bars
from prefopt.trainer.progress import diagnosing
from prefopt.trainer.progress import display as display_module
from prefopt.trainer.progress.diagnosing import SayFindings
from prefopt.trainer.progress.display import SILENT, Display
from prefopt.trainer.progress.parts import Part
from prefopt.trainer.progress.rows import row_line
from prefopt.trainer.progress.showing import ProgressDisplay
from prefopt.trainer.progress.tokenising import tokenising

SHOWN: dict[str, Any] = {"disable_tqdm": False}


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand() -> Hand:
    return Hand()


# -- parts and lines ---------------------------------------------------------------------------------------------------


def test_speeds_and_the_rest_of_a_part(hand: Hand) -> None:
    """Ten steps of eight pairs in two seconds each: four pairs a second, and twenty seconds for ten more."""
    part = Part("training", 20, "steps", clock=hand)
    for _ in range(10):
        hand.now += 2.0
        part.advance(1, 8, 4000)
    assert part.progress() == "10/20 steps"
    assert part.speeds() == "4.00 pairs/s  2,000 tokens/s"
    assert part.remaining() == "ETA 20.0 s"
    assert part.ending() == "training: 10 of 20 steps in 20.0 s, 4.00 pairs/s, 2,000 tokens/s"


def test_a_resumed_part_takes_its_speed_from_its_own_steps(hand: Hand) -> None:
    part = Part("training", 100, "steps", done=80, clock=hand)
    assert part.remaining() == ""
    hand.now += 5.0
    part.advance(10, 40, 0)
    assert (part.progress(), part.remaining()) == ("90/100 steps", "ETA 5.0 s")


def test_a_part_within_another_does_not_slow_it_down(hand: Hand) -> None:
    lines: list[str] = []
    shown = Display(lines.append, clock=hand)
    with shown.part("training", 4, "steps") as training:
        hand.now += 1.0
        training.advance(1, 10, 0)
        with shown.part("evaluation", 5, "pairs") as evaluation:
            hand.now += 50.0
            evaluation.advance(5, 5, 0)
            with shown.part("samples", 1, "prompts"):
                hand.now += 49.0
        hand.now += 1.0
        training.advance(1, 10, 0)
    assert training.speeds() == "10.0 pairs/s"
    assert training.seconds == 101.0
    assert lines[-1] == "training: 2 of 4 steps in 1:41; 10.0 pairs/s without samples and evaluation"


def test_other_ranks_have_as_many_pairs_or_fewer(hand: Hand) -> None:
    """Nine pairs on two ranks: five here and four there; a batch without tokens is a dummy."""
    part = Part("evaluation", 9, "pairs", clock=hand)
    hand.now += 1.0
    batches = [
        SimpleNamespace(rows=range(rows), num_model_tokens=tokens) for rows, tokens in ((4, 100), (1, 25), (3, 0))
    ]
    part.advance_by(SimpleNamespace(micro_batches=batches), 2)  # type: ignore[arg-type]
    assert part.ending() == "evaluation: 9 pairs in 1.0 s, 9.00 pairs/s, 250 tokens/s"


def test_lines_of_a_long_evaluation(hand: Hand) -> None:
    """One when training begins; of what is within it, one each half minute and one at the end."""
    lines: list[str] = []
    shown = Display(lines.append, clock=hand)
    with shown.part("training", 1, "steps"), shown.part("evaluation", 100, "pairs") as evaluation:
        for _ in range(100):
            hand.now += 1.0
            evaluation.advance(1, 1, 10)
    assert lines == [
        "training: 1 steps",
        "evaluation: 31/100 pairs, 1.00 pairs/s, 10.0 tokens/s, ETA 1:09",
        "evaluation: 62/100 pairs, 1.00 pairs/s, 10.0 tokens/s, ETA 38.0 s",
        "evaluation: 93/100 pairs, 1.00 pairs/s, 10.0 tokens/s, ETA 7.0 s",
        "evaluation: 100 pairs in 1:40, 1.00 pairs/s, 10.0 tokens/s",
        "training: 0 of 1 steps in 1:40",
    ]


def test_lines_cannot_steer_a_terminal() -> None:
    lines: list[str] = []
    with Display(lines.append).part("evaluation of \x1b[2J", 1, "pairs"):
        pass
    Display(lines.append).line("a\rb\nc")
    assert not re.search(r"[\x1b\r\n]", "".join(lines))


ROWS: list[tuple[dict[str, Any], str | None]] = [
    ({"loss": 0.69314, "rewards/margins": -1.0, "logps/chosen": -9.0, "mine": 3}, "loss 0.6931  margin -1  mine 3"),
    ({"eval_loss": 2.0, "eval_rewards/margins": 1.0, "eval_mine": 0.5}, "eval:  loss 2  margin 1  mine 0.5"),
    (
        {"eval_hard_loss": 2.0, "eval_hard_rewards/margins": 1.0, "eval_hard_runtime": 9.0},
        "eval_hard:  loss 2  margin 1",
    ),
    ({"loss": float("nan"), "skipped_steps": 1.0}, "loss nan  skipped_steps 1"),
    ({"train_loss": 0.5, "train_runtime": 3.0}, None),
    ({"note": "words", "other": 1}, "other 1"),
]


@pytest.mark.parametrize(("row", "expected"), ROWS, ids=range(len(ROWS)))
def test_rows_as_lines(row: dict[str, Any], expected: str | None) -> None:
    assert row_line(row, 5, 10) == (None if expected is None else f"step 5/10  {expected}")


# -- runs without a terminal -------------------------------------------------------------------------------------------


def lines_of(capsys: pytest.CaptureFixture) -> list[str]:
    printed = capsys.readouterr()
    assert not re.search(r"[\r\x1b]", printed.out + printed.err)
    assert "it/s" not in printed.err
    return printed.out.splitlines()


def test_a_run_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part, each logging step once, nothing twice in a second ``train()``."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    options = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2, "max_steps": 4, "count": 12}
    run = trainer(
        tmp_path, eval_dataset=dataset(5), precompute_ref_log_probs=True, save_strategy="steps", **options, **SHOWN
    )
    run.train()
    found = [re.sub(r"( in|  loss| from).*", "", line) for line in lines_of(capsys)]
    first = [f"tokenising {name} data: {count} rows" for name, count in (("train", 12), ("eval", 5)) for _ in range(2)]
    rest = [
        *(
            "reference log-probs: 12 pairs",
            "reference log-probs: 12 pairs",
            "training: 4 steps",
            "step 2/4",
            "step 4/4",
        ),
        *("reference log-probs: 5 pairs", "evaluation: 5 pairs", "step 4/4  eval:", "training: 4 steps"),
    ]
    assert found == [*first, *rest]
    run.train()
    found = [re.sub(r"( in|  loss| from).*", "", line) for line in lines_of(capsys)]
    assert found == [line for line in rest if "reference" not in line]


def test_a_failed_run_ends_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("planted")

    run = trainer(tmp_path, callbacks=[Fails()], **SHOWN)
    with pytest.raises(RuntimeError, match="planted"):
        run.train()
    assert lines_of(capsys)[-1].startswith("training: 0 of 6 steps in")
    assert run.own_display.open == []
    assert not datasets.are_progress_bars_disabled()


def test_a_resumed_run_begins_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **options).train()
    capsys.readouterr()
    trainer(tmp_path, **options, **SHOWN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = lines_of(capsys)
    assert "training: 4 steps, from 2 on" in found
    assert [line[:8] for line in found if line.startswith("step")] == ["step 3/4", "step 4/4"]


class BrandNewProgressCallback(TrainerCallback):
    """A bar of the user's, known by its name."""


@pytest.mark.parametrize(
    "how", ["disable_tqdm", "own bar", "transformers' bar", "taken out", "another rank", "notebook"]
)
def test_who_is_silent(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(SHOWN)
    if how == "another rank":
        monkeypatch.setattr("accelerate.PartialState.is_main_process", property(lambda state: False))
    if how == "notebook":
        monkeypatch.setattr(display_module, "is_in_notebook", lambda: True)
    if how == "disable_tqdm":
        options["disable_tqdm"] = True
    if how == "own bar":
        options["callbacks"] = [BrandNewProgressCallback()]
    if how == "transformers' bar":
        options["callbacks"] = [ProgressCallback()]
    run = trainer(tmp_path, max_steps=1, **options)
    assert "Tokenising" not in capsys.readouterr().err or how == "notebook"
    if how in ("disable_tqdm", "taken out"):
        run.remove_callback(PrinterCallback if how == "disable_tqdm" else ProgressCallback)
    capsys.readouterr()
    run.train()
    assert run.display is SILENT
    assert "step 1/1" not in capsys.readouterr().out


def test_in_notebooks_transformers_own_display_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotebookProgressCallback(TrainerCallback):
        pass

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    run = trainer(tmp_path, max_steps=1, **SHOWN)
    kinds = [type(callback) for callback in run.callback_handler.callbacks]
    assert NotebookProgressCallback in kinds
    assert ProgressDisplay not in kinds
    assert run.display is SILENT


@pytest.mark.trl
def test_trls_rich_bars_stay_alone(tmp_path: Path) -> None:
    callback = pytest.importorskip("trl").RichProgressCallback()
    assert trainer(tmp_path, callbacks=[callback], **SHOWN).display is SILENT


# -- tokenising, bars of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_are_counted_in_every_process(num_proc: int | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer(tmp_path, count=300, dataset_num_proc=num_proc, **SHOWN)
    found = [line for line in lines_of(capsys) if line.startswith("tokenising")]
    assert found[0] == "tokenising train data: 300 rows"
    assert re.fullmatch(r"tokenising train data: 300 rows in .*rows/s", found[1])


def test_rows_from_the_cache_and_prepared_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset(30).to_json(file := tmp_path / "rows.jsonl")
    for expected in ("tokenising train data: 30 rows in", "tokenising train data: 30 rows from the cache"):
        rows = datasets.load_dataset("json", data_files=[str(file)], cache_dir=str(tmp_path / "cache"), split="train")
        capsys.readouterr()
        run = trainer(tmp_path, rows=rows, **SHOWN)
        assert lines_of(capsys)[1].startswith(expected)
    trainer(tmp_path, rows=run.train_dataset, **SHOWN)
    assert lines_of(capsys) == []


def test_switched_off_bars_of_datasets_are_heeded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets.disable_progress_bars()
    try:
        trainer(tmp_path, **SHOWN)
        assert lines_of(capsys) == []
        with without_bars():
            pass
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()


def test_counting_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with tokenising(Display(lambda line: None), "train", 4) as rows:
        assert rows is not None
        rows(3)
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [3]
    assert list(tmp_path.iterdir()) == []


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_no_step_waits_for_the_device_because_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read a step, as without it: whether the step is finite."""
    counts = [reads(tmp_path, monkeypatch, 2, disable_tqdm=silent) for silent in (True, False)]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 1


# -- findings in the log -----------------------------------------------------------------------------------------------


def findings_after(length: int) -> Any:
    """A stand-in for `diagnose`: of so many rows it finds something wrong, and always something good."""

    def found(rows: list[Any], facts: dict[str, Any]) -> list[Finding]:
        given.append((len(rows), facts))
        bad = [Finding("name", "bad", 3, "Text.", "Advice.")] if len(rows) >= length else []
        return [*bad, Finding("fine", "good", 1, "Good.", "")]

    given: list[tuple[int, dict[str, Any]]] = []
    found.given = given  # type: ignore[attr-defined]
    return found


def test_a_finding_is_said_once_while_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings_after(4)
    monkeypatch.setattr(diagnosing, "diagnose", found)
    run = trainer(tmp_path, "cpo")
    run.train()
    said = [record.getMessage() for record in caplog.records if record.name == diagnosing.__name__]
    assert said == ["Step 3: name: Text. Advice."]
    (_, first), *_, (length, last) = found.given
    assert (length, last["progress"], last["method"], last["losses"]) == (7, 1.0, "cpo", ["sigmoid"])
    assert first["data"]["train"]["rows"] == 40
    assert [number for number, _ in found.given][:5] == [0, 1, 2, 3, 4]
    run.train()
    assert sum(record.name == diagnosing.__name__ for record in caplog.records) == 2, "once for each run"


def test_many_rows_are_not_gone_through_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings_after(10**9)
    monkeypatch.setattr(diagnosing, "diagnose", found)
    run = trainer(tmp_path, max_steps=0)
    teller = SayFindings(run)
    state = SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=0, max_steps=1000)
    teller.on_train_begin(run.args, state, None)
    for step in range(1000):
        state.log_history.append({"step": step})
        teller.on_log(run.args, state, None)
    looked = [number for number, _ in found.given]
    assert sum(looked) < 25 * 1000
    assert all(later <= 1.06 * sooner + 1 for sooner, later in itertools.pairwise(looked[1:]))


def test_other_ranks_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings_after(0)
    monkeypatch.setattr(diagnosing, "diagnose", found)
    teller = SayFindings(trainer(tmp_path))
    state = SimpleNamespace(is_world_process_zero=False, log_history=[{}], global_step=1, max_steps=2)
    for event in (teller.on_train_begin, teller.on_log, teller.on_train_end):
        event(teller.trainer.args, state, None)
    assert found.given == []
