"""The benchmarks start, their arithmetic is right, and the README shows what their result files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("steps", "memory", "head", "attention", "prepare", "startup", "sweep", "gpu")
sys.path.insert(0, str(BENCHMARKS))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_does(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_readme_shows_the_newest_results() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "table.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_say_what_was_measured_on_what() -> None:
    paths = sorted((BENCHMARKS / "results").glob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert path.name == f"{result['date']}-{result['name']}-{result['hardware']}.json"
        assert {"torch", "python"} <= result["versions"].keys()


def test_useful_work_of_a_pair() -> None:
    """A Qwen3-0.6B with a prompt of 200 and completions of 350 tokens: 4,334 GFLOP with a reference, 3,258 without."""
    from workload import SHAPES, useful_flops

    shape = SHAPES["qwen3-0.6b"]
    online, cached = (useful_flops(shape, 200, [350, 350], reference=reference) / 1e9 for reference in (True, False))
    assert online == pytest.approx(4334, rel=2e-3)
    assert cached == pytest.approx(3258, rel=2e-3)


def test_rows_have_the_lengths_they_are_named_for(tmp_path: Path) -> None:
    from workload import WORKLOADS, describe_lengths, make_rows

    path = tmp_path / "rows.jsonl"
    row = {"prompt": "baba dada", "chosen": " fafa gaga kaka", "rejected": " lala mama"}
    path.write_text("\n".join(json.dumps({**row, "prompt": f"{row['prompt']} {'nana ' * n}"}) for n in range(40)))
    tokenizer = word_tokenizer(with_bos=False)
    workload = WORKLOADS["equal_lengths"]
    rows = make_rows(workload, path, tokenizer, 8)
    lengths = describe_lengths(rows, tokenizer, workload.max_length)
    assert len(rows) == 8
    assert [lengths[column]["max"] for column in ("prompt", "chosen", "rejected")] == [64, 449, 449]
    triples = make_rows(WORKLOADS["tpo"], path, tokenizer, 8)
    assert all(row["reference"] for row in triples)


def test_one_side_trains_and_measures(tmp_path: Path) -> None:
    """The smallest run of a side, end to end: a line of JSON with seconds, pairs and peak memory."""
    from results import run_side

    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"baba {'dada ' * n}", "chosen": "fafa gaga", "rejected": "kaka"} for n in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    word_tokenizer(with_bos=False).save_pretrained(tmp_path / "tokenizer")
    result = run_side(
        {
            "library": "prefopt",
            "workload": "dpo",
            "data": str(path),
            "tokenizer": str(tmp_path / "tokenizer"),
            "steps": 1,
            "threads": 1,
        }
    )
    assert len(result["seconds"]) == 1
    assert result["pairs_per_second"] > 0
    assert result["peak_bytes"] > 0
