"""``prefopt stats`` on the command line: data, run files, its files, its messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from prefopt.cli.main import main
from prefopt.cli.train import make_parser, make_trainer
from prefopt.data import prepare_report
from prefopt.inspection.statistics import measure
from prefopt.inspection.statistics.page import page
from prefopt.quickstart import ASSETS, preference_set
from prefopt.types import PAIR

TWO_MEGABYTES = 2_000_000
LIMIT = "16"
"""Tokens; cuts some rows of the quickstart."""
SHAREGPT = {
    "columns": {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "messages": {"role_key": "from", "content_key": "value", "roles": {"human": "user", "gpt": "assistant"}},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of the quickstart, one of them identical on both sides, one twice."""
    rows = preference_set("train", 40).to_list()
    rows[7]["chosen"] = rows[7]["rejected"]
    rows[9] = rows[3]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def stats(*arguments: str) -> int:
    return main(["stats", *map(str, arguments)])


def test_the_command_prints_what_is_in_the_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(str(data)) == 0
    printed, said = capsys.readouterr()
    assert "Generating" not in said, "a bar of datasets"
    assert re.search(r"^  rows +40$", printed, re.MULTILINE)
    assert "1 of 40 rows (2.5 %) is left out: chosen equal to rejected. (row 7)" in printed
    assert "(rows 3 = 9" in printed
    assert "tokens per pair" not in printed


def test_the_numbers_of_a_run_file_are_those_of_its_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report of the trainer that the same file makes; an option on the command line wins in both."""
    settings = {
        "method": "cpo",
        "model_name_or_path": str(ASSETS),
        "datasets": [{"path": str(data), "columns": ["prompt", "chosen", "rejected"]}],
        "max_length": 60,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": "none",
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out.json"
    assert stats(str(run_file), "--max_length", LIMIT, "--json", str(out)) == 0
    assert "tokens per pair" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert not (tmp_path / "out").exists()

    configs = make_parser("cpo").parse_args_and_config(["--config", str(run_file), "--max_length", LIMIT])
    report = prepare_report(make_trainer("cpo", *configs).train_dataset)
    assert report.num_truncated > 0
    assert found["preparation"]["skipped"] == report.skipped
    assert len(found["preparation"]["truncated"]) == report.num_truncated
    assert [limit["max_length"] for limit in found["limits"] if "max_length" in limit["meaning"]] == [int(LIMIT)]


def test_all_rows_are_in_the_json_file(tmp_path: Path) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    Dataset.from_list([{"prompt": f"Q{n}", "chosen": "same", "rejected": "same"} for n in range(300)]).to_json(path)
    assert stats(str(path), "--json", str(out)) == 1  # nothing is left to train on
    assert json.loads(out.read_text())["preparation"]["skipped"] == {"chosen equal to rejected": list(range(300))}


def test_broken_rows_give_status_1_and_a_message_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "Q", "chosen": "yes", "rejected": answer} for answer in ("no", None, "never", None)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert stats(str(path)) == 1
    printed = capsys.readouterr().out
    assert "bad  2 of 4 rows (50 %) cannot be read. (rows 1, 3)" in printed
    assert "row 3, column 'rejected': the value is None" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no local file or folder"),
        (["--max_length", "5"], "wants the data first"),
        (["data.jsonl", "--max_lenght", "5"], "did you mean 'max_length'"),
        (["data.jsonl", "--max_rows", "0"], "at least one row"),
        (["data.jsonl", "--max_rows", "few"], "invalid int value"),
        (["data.jsonl", "--mapping", "none.yaml"], "none.yaml: there is no such file"),
        (["run.yaml", "--mapping", "map.yaml"], "--mapping goes with a data set"),
        (["data.jsonl", "--method", "ppo"], "invalid choice: 'ppo'"),
        (["wrong.jsonl"], "no column 'chosen'"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}')
    Path("wrong.jsonl").write_text('{"prompt": "Q", "good": "a", "bad": "b"}')
    Path("run.yaml").write_text("method: dpo")
    assert stats(*arguments) == 2
    error = capsys.readouterr().err
    assert message.lower() in error.lower()
    assert "Traceback" not in error


def test_a_mapping_with_other_entries_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = tmp_path / "map.yaml"
    mapping.write_text("columns: {chosen: good}\nfraction: 0.5\n")
    assert stats("data.jsonl", "--mapping", str(mapping)) == 2
    assert "unknown entry 'fraction'" in capsys.readouterr().err


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m"


def test_the_page_is_whole_small_and_harmless() -> None:
    """Thousands of duplicates, broken rows and long names, all of them with what a browser would run."""
    same = {"prompt": "Q", "chosen": "so", "rejected": "so", HOSTILE: "x"}
    rows = [{"prompt": HOSTILE, "chosen": f"a{n % 900}", "rejected": "no", HOSTILE: "x"} for n in range(1800)]
    rows += [same] * 3000
    rows += [{"prompt": None, "chosen": "a", "rejected": "no", HOSTILE: "x"} for _ in range(1500)]
    made = page(measure(Dataset.from_list(rows), PAIR, name=HOSTILE * 10_000))
    assert len(made.encode()) < TWO_MEGABYTES
    assert "<script" not in made
    assert "<img src=x" not in made
    assert "\x1b" not in made
    assert "&lt;script&gt;" in made
    assert made.count("<svg") == 2
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", made)
    assert "and 2,800 more" in made  # of the rows that are left out
    assert "and 701 more" in made  # of the groups


def test_a_page_with_tokens_has_every_plot(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert stats(str(data), "--model_name_or_path", str(ASSETS), "--html", str(out)) == 0
    made = out.read_text()
    assert made.count("<svg") == 3
    for text in ("What max_length cuts", "tokens per pair", "chosen equal to rejected: 1"):
        assert text in made


def test_the_duplicates_of_sharegpt_are_found_by_number(shared: Path, tmp_path: Path) -> None:
    mapping, out = tmp_path / "map.yaml", tmp_path / "out.json"
    mapping.write_text(yaml.safe_dump(SHAREGPT))
    rows = shared / "data" / "sharegpt" / "dpo_en_demo.json"
    assert stats(str(rows), "--mapping", str(mapping), "--json", str(out)) == 0
    found = json.loads(out.read_text())
    pairs = found["duplicates"]["pairs"]
    assert pairs == [[13, 157], [28, 248], [84, 230], [111, 186], [117, 275]]
    raw = json.loads(rows.read_text())
    for one, other in pairs:
        assert raw[one] == raw[other]
    assert found["conversations"]["turns"] == {"1": 194, "2": 1, "3": 57, "4": 46, "5": 1, "7": 1}


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_file_that_cannot_be_written_is_said_before_the_data_is_read(option: str, tmp_path: Path, capsys) -> None:
    for path, why in ((tmp_path, "is a folder; name a file"), (tmp_path / "nowhere" / "x.html", "there is no folder")):
        assert stats("nowhere.jsonl", option, path) == 2
        printed = capsys.readouterr().err
        assert f"{option} {path}: {why}" in printed
        assert "nowhere.jsonl" not in printed
