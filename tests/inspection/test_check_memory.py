"""What `prefopt check` says of memory is what the run then uses: each in a process of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scale import LONG, scaled
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefopt.quickstart import ASSETS

SIZES = {"2M": (160, 4), "5M": (256, 6), "30M": (512, 10), "100M": (768, 14)}
"""Parameters -> hidden size and layers."""
METHODS = {
    "reference": ["dpo", "sigmoid"],
    "none": ["cpo", "simpo"],
}
WHOLE = [(size, way, reference) for size in ("5M", "30M", "100M") for way in ("full", "lora") for reference in METHODS]
SAMPLE = [("5M", "full", "reference")]

WITHIN = 0.10
"""Of what the run uses, as the issue asks; the allocator and the order of threads account for 1 to 3 %."""
MODEL_WITHIN = 0.25
"""Of what the run uses beyond the interpreter and its libraries, in runs where that is more than `WORTH` bytes."""
WORTH = 150 * 2**20

SCRIPT = """
import json, sys
from prefopt.inspection.checking.trial import peak_memory
import prefopt
prefopt.DPOTrainer, prefopt.CPOTrainer
base = peak_memory()["resident"]
command, path = sys.argv[1:]
if command == "check":
    from rich.console import Console
    from prefopt.cli.check import everything
    from prefopt.cli.run_file import method_and_arguments
    checked, need = everything(*method_and_arguments("check", [path]), str, Console(stderr=True))
    assert checked.findings.will_run, checked.findings.problems
    found = {"peak": checked.trial.peak["resident"], "seconds": need.training}
else:
    from prefopt.cli.main import main
    assert main(["train", path]) == 0
    found = {"peak": peak_memory()["resident"]}
print("FOUND " + json.dumps({"base": base, **found}))
"""


def write_model(folder: Path, size: str) -> None:
    hidden, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=506,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS).save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    """Rows of very different lengths, so that the largest step is far from the usual one."""
    chance = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(("bee", "moth", "wolf", "worm"), k=chance.randint(least, most)))

    rows = ({"prompt": text(4, 30), "chosen": " " + text(2, 25), "rejected": " " + text(2, 25)} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(command: str, path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, str(path)], capture_output=True, text=True, cwd=path.parent, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND ")[2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(("size", "way", "reference"), scaled(SAMPLE, WHOLE))
def test_the_estimate_is_what_the_run_uses(size, way, reference, tmp_path):
    write_model(tmp_path / "model", size)
    write_rows(tmp_path / "rows.jsonl", 120)
    method, loss = METHODS[reference]
    values = {
        "method": method,
        "loss_type": loss,
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    if way == "lora":
        values |= {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    estimate = measured("check", tmp_path / "run.yaml")
    assert not (tmp_path / "out").exists()
    run = measured("train", tmp_path / "run.yaml")
    beyond = [found["peak"] - found["base"] for found in (estimate, run)]
    if LONG:
        mib = [round(value / 2**20) for value in (estimate["peak"], run["peak"], *beyond)]
        print(f"\n| {size} | {way} | {reference} | {mib[0]} | {mib[1]} | {mib[2]} | {mib[3]} |")
    assert estimate["peak"] == pytest.approx(run["peak"], rel=WITHIN)
    if beyond[1] > WORTH:
        assert beyond[0] == pytest.approx(beyond[1], rel=MODEL_WITHIN)
