"""`prefopt check` lists all mistakes in options, and every row that is broken or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checked_runs import check, problems, rows_of, run_file, write
from datasets import Dataset
from short_runs import dataset
from transformers import AutoTokenizer

from prefopt.cli.main import main
from prefopt.data import PrepareOptions
from prefopt.inspection.checking.rows import check_rows
from prefopt.quickstart import ASSETS
from prefopt.types import PAIR


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- options -----------------------------------------------------------------------------------------------------------


def test_all_mistakes_in_options_come_at_once_each_with_its_line(capsys):
    write(rows_of(4))
    path = run_file(beta=-1.0, max_length="long", loss_type="robust", label_smoothing=0.7)
    assert main(["check", path, "--num_train_epochs", "-3"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    starts = [
        "run.yaml:9: beta=",
        "run.yaml:10: max_length",
        "run.yaml:12: label_smoothing=",
    ]
    for start in [*starts, "--num_train_epochs: num_train_epochs=-3"]:
        assert len([line for line in lines if line.startswith(f"error: {start}")]) == 1, (start, lines)
    assert len(lines) == 4


def test_names_that_are_none_come_before_everything_else_in_file_and_flags_alike(capsys):
    assert main(["check", run_file(beta=-1.0, lerning_rate=1e-6), "--sed", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prefopt: run.yaml:10: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        "unknown option --sed; did you mean 'seed'?",
    ]


def test_an_option_without_effect_is_a_warning_with_its_line():
    write(rows_of())
    checked, _ = check(ref_model_sync_steps=3)
    assert [problem.place for problem in problems(checked, "warning") if "ref_model_sync_steps" in problem.what] == [
        "run.yaml:9"
    ]
    assert checked.findings.will_run


@pytest.mark.parametrize(
    "arguments", [["nowhere.yaml"], ["run.yaml", "--bta", "1"], ["--beta", "1"], ["run.yaml", "--beta", "much"]]
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    write(rows_of(4))
    run_file()
    try:
        status: Any = main(["check", *arguments])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2


@pytest.mark.parametrize("given", ["nowhere", "out/checkpoint-2"])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_an_error(given):
    write(rows_of())
    checked, _ = check(resume_from_checkpoint=given)
    (problem,) = problems(checked)
    assert problem.place == "run.yaml:9"
    assert f"{given} cannot be gone on from" in problem.what
    assert checked.trial is not None, "the rest is looked at all the same"


def test_a_run_that_goes_on_is_held_against_its_checkpoint(capsys):
    write(rows_of())
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    assert main(["train", run_file(**options)]) == 0
    saved = Path("out", "checkpoint-2")
    assert saved.is_dir()
    checked, _ = check(resume_from_checkpoint=str(saved), **{**options, "max_steps": 4})
    assert problems(checked) == []
    assert checked.trial is not None
    checked, _ = check(resume_from_checkpoint=str(saved), beta=0.5, **options)
    (problem,) = problems(checked)
    assert problem.place == "run.yaml:9"
    assert "beta" in problem.what
    write(rows_of()[::-1])
    checked, _ = check(resume_from_checkpoint=str(saved), **options)
    (problem,) = problems(checked)
    assert "data: rows" in problem.what


@pytest.mark.parametrize(
    ("tracker", "message"),
    [("tensorbord", "did you mean 'tensorboard'?"), ("neptune", "pip install neptune")],
    ids=["no such", "not installed"],
)
def test_a_tracker_that_is_not_there_ends_run_and_check(tracker, message, monkeypatch, capsys):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_neptune_available", lambda: False)
    write(rows_of())
    checked, _ = check(report_to=tracker)
    (problem,) = problems(checked)
    assert problem.place == "run.yaml:6"
    assert message in f"{problem.what}; {problem.fix}"
    assert main(["train", "run.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_a_metric_that_no_evaluation_gives_ends_run_and_check(capsys):
    Path("data").mkdir()
    for split in ("train", "test"):
        write(rows_of(), f"data/{split}.jsonl")
    options = {"dataset_name": "data", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    checked, _ = check(metric_for_best_model="rewards/acuracies", **options)
    (problem,) = problems(checked)
    assert problem.place == "run.yaml:9"
    assert "did you mean 'eval_rewards/accuracies'?" in f"{problem.what}; {problem.fix}"
    assert main(["train", "run.yaml"]) == 2
    assert "Set one of those that there are: eval_" in capsys.readouterr().err
    checked, _ = check(metric_for_best_model="rewards/accuracies", **options)
    assert problems(checked) == []


def test_ctrl_c_ends_it(monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefopt.cli.check.everything", interrupted)
    assert main(["check", run_file()]) == 130


def test_of_several_processes_one_is_checked():
    write(rows_of())
    checked, _ = check("--num_processes", "2")
    assert checked.findings.will_run
    assert [problem.what for problem in problems(checked, "note") if "--num_processes 2" in problem.what]


def test_the_help_is_short(capsys):
    assert main(["check", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_broken_row_of_both_splits_is_counted_and_the_first_of_each_kind_are_named(capsys):
    folder = Path("data")
    folder.mkdir()
    train, test = rows_of(300), rows_of(12)
    for index in range(100, 300, 10):
        train[index]["chosen"] = None
    train[7]["rejected"] = 5
    train[8]["rejected"] = train[8]["chosen"]
    test[11]["prompt"] = None
    write(train, "data/train.jsonl")
    write(test, "data/test.jsonl")
    assert main(["check", run_file(dataset_name="data", eval_strategy="steps", eval_steps=2)]) == 1
    out = capsys.readouterr().out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "train data, row 7, column 'rejected'" in errors[0]
    assert [f"row {number}," in line for number, line in zip((100, 110, 120, 130, 140), errors[1:6], strict=True)]
    assert "15 more rows like these" in errors[6]
    assert "eval data, row 11, column 'prompt'" in errors[7]
    assert "22 errors" in out
    assert "warning: train data, row 8: chosen equal to rejected" in out, "the number is that of the user's row"


def test_the_rows_that_are_left_are_those_a_run_would_take():
    rows = rows_of(20)
    rows[3]["chosen"], rows[5]["rejected"], rows[6]["chosen"] = None, "", ""
    tokenizer = own_tokenizer()
    found = check_rows(Dataset.from_list(rows), tokenizer, PrepareOptions(PAIR, 256, "keep_start"), "train")
    assert [error.row for error in found.broken] == [3]
    assert found.report.skipped == {"empty completion": [5, 6]}
    assert found.prepared is not None
    kept = [row for index, row in enumerate(rows) if index not in (3, 5, 6)]
    alone = check_rows(Dataset.from_list(kept), tokenizer, PrepareOptions(PAIR, 256, "keep_start"), "train")
    assert alone.prepared is not None
    assert found.prepared["chosen_ids"][:] == alone.prepared["chosen_ids"][:]
    assert found.prepared["row"][:] == [index for index in range(20) if index not in (3, 5, 6)]


def own_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


def test_lengths_are_those_of_the_tokens():
    found = check_rows(dataset(9), own_tokenizer(), PrepareOptions(PAIR, 64, "keep_start"), "train")
    assert found.prepared is not None
    by_part = {item.part: item for item in found.lengths}
    chosen = [len(ids) for ids in found.prepared["chosen_ids"]]
    whole = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))  # type: ignore[index]
        for row in found.prepared
    ]
    assert by_part["chosen"].mean == pytest.approx(sum(chosen) / 9)
    assert by_part["prompt + longest completion"].most == max(whole)


def test_rows_that_end_a_run_are_errors():
    rows = rows_of()
    rows[2]["chosen"] = ""
    write(rows)
    checked, _ = check(on_bad_row="error")
    assert [problem.place for problem in problems(checked)] == ["train data, row 2"]


def test_messages_want_a_chat_template():
    rows = [{key: [{"role": "user", "content": value}] for key, value in row.items()} for row in rows_of(3)]
    write(rows)
    checked, _ = check()
    assert checked.findings.count("error") == 3
    assert all("chat template" in problem.what for problem in problems(checked))


def test_text_of_data_is_shown_as_it_is(capsys):
    rows = rows_of(6)
    rows[1]["chosen"] = [{"\x1b[2J[bold]": 1}]
    write(rows)
    assert main(["check", run_file()]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out


def test_a_missing_split_leaves_the_other_one_checked():
    rows = rows_of()
    rows[4]["chosen"] = None
    write(rows)
    checked, _ = check(eval_strategy="steps", eval_steps=2)
    assert [problem.place for problem in problems(checked)] == ["run.yaml:2", "train data, row 4, column 'chosen'"]


def test_a_stream_is_looked_at_and_needs_max_steps():
    write(rows_of())
    checked, need = check(dataset_streaming=True)
    assert checked.findings.will_run
    assert need is not None
    assert need.epoch is None
    checked, _ = check(dataset_streaming=True, max_steps=-1)
    assert [problem.place for problem in problems(checked)] == ["run.yaml:4"]


def test_real_dirt_is_found_by_number(shared, capsys):
    file = shared / "data" / "ultrafeedback" / "train_clean.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    same = [i for i, row in enumerate(rows) if row["chosen"] == row["rejected"]]
    empty = [i for i, row in enumerate(rows) if not (row["chosen"].strip() and row["rejected"].strip())]
    assert (len(same), len(empty)) == (4, 2)
    options = PrepareOptions(PAIR, 512, "keep_start")
    found = check_rows(Dataset.from_list(rows), own_tokenizer(), options, "train")
    assert found.report.skipped["chosen equal to rejected"] == same
    assert found.report.skipped["empty completion"] == empty
    assert not found.broken
