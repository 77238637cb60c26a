"""What `show` prints and writes: marks without colour, pages under 2 MB, hostile text, the command."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data.data_helpers import PAIR_OPTIONS, assistant, byte_tokenizer, user
from datasets import Dataset
from rich.console import Console
from transformers import AutoConfig

from prefopt.cli.main import main
from prefopt.inspection.preview.page import MOST_BYTES_OF_A_PART, preview_page
from prefopt.inspection.preview.rows import RowPreview, preview_rows
from prefopt.inspection.preview.terminal import MARKS, row_text
from prefopt.inspection.preview.tokens import Piece
from prefopt.quickstart import ASSETS, preference_set
from prefopt.terminal import harmless

HOSTILE = "\x1b[31m <script>alert(1)</script> [bold]x[/bold] & \u202e {{ 7 * 7 }} \u4f60"


def shown(rows: list[dict[str, Any]], tokenizer: Any = None) -> list[RowPreview]:
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    return preview_rows(Dataset.from_list(rows), range(len(rows)), tokenizer, PAIR_OPTIONS, name="train")


def printed(preview: RowPreview, capsys: Any, terminal: bool = False, **options: Any) -> str:
    """As into a pipe: nothing but text; or as on a terminal with colours."""
    forced = {"force_terminal": True, "color_system": "256"} if terminal else {}
    console = Console(soft_wrap=True, highlight=False, **forced)
    console.print(row_text(preview, "</s>", **{"with_ids": False, **options}), end="")
    return capsys.readouterr().out


def as_html(previews: Any) -> str:
    return preview_page(previews, "Rows", "about", "</s>")


def page_texts(page: str) -> list[str]:
    """Text of each part."""
    found = re.findall(r'<div class="text">(.*?)</div>', page, flags=re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", part)) for part in found]


def test_no_color_keeps_the_marks_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [preview] = shown([{"prompt": "Hm? ", "chosen": "A.", "rejected": "C."}])
    monkeypatch.setattr(Console, "_environ", {})  # rich may have been imported while a test had replaced os.environ
    assert re.search(r"\x1b\[[\d;]*3\d", printed(preview, capsys, terminal=True)), "colours, where they are wanted"
    monkeypatch.setattr(Console, "_environ", {"NO_COLOR": "1"})
    text = printed(preview, capsys, terminal=True)
    assert not re.search(r"\x1b\[[\d;]*3\d", text), "no colour"
    assert MARKS["trained"][0] in text


def test_marks_stay_where_there_is_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [assistant("A."), user("B"), assistant("\u4f60")]
    [preview] = shown([{"prompt": [user("Hm?")], "chosen": turns, "rejected": [assistant("C.")]}])
    text = printed(preview, capsys, with_ids=True)
    opened, closed = MARKS["trained"]
    quiet, ended = MARKS["untrained"]
    assert "\x1b" not in text
    assert f"{opened}A.\u2039<|im_end|>\u203a" in text
    assert f"{quiet}\u2039<|im_start|>\u203auser\u23ce\nB" in text
    assert f"{opened}\u4f60\u2083\u2039<|im_end|>\u203a\u23ce\n{closed}" in text
    assert "ids  " in text
    assert ended in text


def test_what_is_printed_is_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Without its marks; of text that a terminal would obey, and that rich would take for markup."""
    [preview] = shown([{"prompt": HOSTILE, "chosen": " a\n" * 200, "rejected": " b"}])
    text = printed(preview, capsys)
    prompt, chosen, _ = re.split(r"\nchosen  .*\n|\nrejected  .*\n", text.partition("tokens\n")[2])
    assert re.sub("[\u2080-\u2089]", "", prompt) == harmless(HOSTILE)
    for mark in (*MARKS["trained"], "\u23ce", "\u2039</s>=eos\u203a"):
        chosen = chosen.replace(mark, "")
    assert chosen == " a\n" * 200
    assert "\x1b" not in text


def test_pages_show_the_text_and_run_nothing() -> None:
    [preview] = shown([{"prompt": HOSTILE, "chosen": " a</div>b", "rejected": " b"}])
    page = as_html([preview])
    assert page_texts(page) == [harmless(HOSTILE), " a</div>b</s>", " b</s>"]
    assert "<script" not in page
    assert "\x1b" not in page
    tokenizer = byte_tokenizer()
    [last] = tokenizer("b", add_special_tokens=False)["input_ids"]
    assert f'<b title="{last}">b</b><b class="special" title="1 eos">&lt;/s&gt;</b>' in page


def test_pages_stay_under_2_mb() -> None:
    """Whatever the rows: many of them, long ones, and characters that take most bytes when they are escaped."""
    worst = Piece("&\x1b\u202e" * 50, (151645,) * 40, "prompt")
    parts = preview_rows(
        Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        [0],
        byte_tokenizer(),
        PAIR_OPTIONS,
        name="x",
    )
    one = parts[0].branches["chosen"]
    huge = type(one)((worst,) * 300, (worst,) * 300)
    previews = [RowPreview(row, {"chosen": huge, "rejected": huge}) for row in range(8)]
    page = as_html(previews)
    assert 1_000_000 < len(page.encode()) < 2_000_000
    [left_out] = re.findall(r"(\d+) rows are left out, so that the page stays under 2 MB: ([\d, ]+)", page)
    assert page.count("<section>") == 8 - int(left_out[0])
    assert left_out[1].startswith(str(8 - int(left_out[0])))
    assert max(map(len, re.split("<section>", page))) < 4 * MOST_BYTES_OF_A_PART
    assert re.search(r"\.\. [\d,]+ more tokens \.\.", page)


def test_every_row_is_on_a_page_that_has_room() -> None:
    previews = shown([{"prompt": f"{row}?", "chosen": " a", "rejected": " b"} for row in range(30)])
    page = as_html(previews)
    assert re.findall(r'<h2 id="row-(\d+)">', page) == [str(row) for row in range(30)]
    assert "left out" not in page


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model is a folder of a config and a tokenizer, without weights."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for split, rows in (("train", preference_set("train", 12)), ("test", preference_set("held_out", 4))):
        rows.to_json(f"data/{split}.jsonl")
    shutil.copytree(ASSETS, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("run.yaml").write_text("model_name_or_path: model\ndataset_name: data\noutput_dir: out\nuse_cpu: true\n")
    return tmp_path / "run.yaml"


def test_the_command_shows_rows_without_weights(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "run.yaml", "--rows", "1,3", "--ids"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"row (\d+)", out) == ["1", "3"]
    assert "2 of 12 rows, train, DPO" in out
    assert preference_set("train", 12)[3]["chosen"] in re.sub("[\u27e6\u27e7]", "", out)
    assert not Path("out").exists()
    assert main(["show", "run.yaml"]) == 0
    assert re.findall(r"\n\u2500\u2500 row (\d+)", capsys.readouterr().out) == ["0", "1", "2"]


def test_options_splits_and_pages(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max_length", "12", "--truncation_mode", "keep_end", "--html", "show.html"]
    assert main(["show", "run.yaml", "--split", "test", "--rows", "random:2", *options]) == 0
    assert "prompt and completion: at most 12 tokens, keep_end" in capsys.readouterr().out
    page = Path("show.html").read_text()
    assert "2 of 4 rows, test, DPO" in page
    assert 'class="cut"' in page


def test_a_row_that_would_end_the_run_gives_status_1(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "a", "chosen": None, "rejected": "b"}
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, [{**row, "chosen": "c"}, row])))
    assert main(["show", "run.yaml", "--dataset_name", "bad.jsonl", "--rows", "0"]) == 0
    assert main(["show", "run.yaml", "--dataset_name", "bad.jsonl", "--rows", "1"]) == 1
    assert "training would stop here: train data, row 1, column 'chosen': the value is None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "12"], "--rows: there is no row 12: the train data has 12 rows"),
        (["--rows", "a"], "'a' is no row; write numbers and stretches"),
        (["--split", "tset"], "there is no split 'tset'; there is: "),
        (["--bta", "1"], "unknown option --bta; did you mean 'beta'?"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere': no tokenizer or processor"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--html", "no/such/folder/show.html"], "--html no/such/folder/show.html: there is no folder no/such/folder"),
        (["--html", "."], "--html .: is a folder; name a file"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "run.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_broken_row(run_file: Path) -> None:
    """As `prefopt show RUN.yaml | head -1`; 1 would say that a row cannot be prepared."""
    code = "import sys; from prefopt.cli.main import main; sys.exit(main(['show', 'run.yaml']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    messages = process.stderr.read().decode()
    assert process.wait() == 128 + 13
    assert "Broken" not in messages


def test_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["show"])
    shown_alone = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["show", "--help"])
    assert capsys.readouterr().out == shown_alone
    lines = shown_alone.splitlines()
    assert 5 < len(lines) <= 60
    assert max(map(len, lines)) <= 80


def test_a_configured_context_limits_what_is_shown(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in training: `max_length` is capped at the model's context."""
    config = AutoConfig.from_pretrained("model")
    config.max_position_embeddings = 9
    config.save_pretrained("model")
    assert main(["show", "run.yaml", "--rows", "0"]) == 0
    assert "prompt and completion: at most 9 tokens, keep_start" in capsys.readouterr().out


def test_without_numbers_the_first_rows_are_shown_that_there_are(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert main(["show", "run.yaml", "--dataset_name", "one.jsonl"]) == 0
    assert "1 of 1 rows, train, DPO" in capsys.readouterr().out
