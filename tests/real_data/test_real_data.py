"""A hundred steps of each method on real preference data with a real small model, through the command line.

The figures are printed; docs/log.md has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.cli.main import main

COMMON: dict[str, Any] = {
    "max_length": 512,
    "max_steps": 100,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "eval_on_start": True,
    "test_split_size": 100,
    "logging_steps": 25,
    "save_steps": 100,
    "report_to": "none",
    "disable_tqdm": True,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("ultrafeedback/train_clean.jsonl", {"method": "dpo", "loss_type": ["sigmoid", "sft"], "beta": 0.05}),
    "simpo": (
        "ultrafeedback/train_clean.jsonl",
        {"method": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 1.0},
    ),
    "tpo": ("gsm8k/triples.jsonl", {"method": "tpo", "beta": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_hundred_steps(name: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, options = RUNS[name]
    run_file = tmp_path / "run.yaml"
    source = {"path": str((shared / "data" / data).parent), "data_files": Path(data).name}
    settings = {
        **COMMON,
        **options,
        "model_name_or_path": str(shared / "models" / "stories260K"),
        "datasets": [source],
        "output_dir": str(tmp_path / "out"),
    }
    run_file.write_text(yaml.safe_dump(settings))
    assert main(["train", str(run_file)]) == 0

    log = json.loads((tmp_path / "out" / "checkpoint-100" / "trainer_state.json").read_text())["log_history"]
    before, after = (row for row in log if "eval_loss" in row)
    train = [row for row in log if "loss" in row]
    with capsys.disabled():
        keys = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "eval_nll_loss", "eval_loss")
        print(f"\n{name}: " + ", ".join(f"{k[5:]} {before[k]:.4g} -> {after[k]:.4g}" for k in keys if k in before))
    assert after["step"] == 100
    assert train[-1]["loss"] < train[0]["loss"]
    assert after["eval_logps/chosen"] > before["eval_logps/chosen"] or name == "simpo"
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
