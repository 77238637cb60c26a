"""Trials that Ray Tune places give what they give alone, in the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.cli.main import main
from prefopt.quickstart import ASSETS, preference_set
from prefopt.sweep.state import Status, read_sweep, trial_folder

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'prefopt[ray]'")
TIMED = ("time", "flos", "per_second", "runtime")
COMMAND = [sys.executable, "-m", "prefopt.cli.main", "sweep"]
SECONDS = 900
"""For Ray to start, which takes 15 s on an idle machine, and two tiny trials; many times that on a busy one."""


def write_sweep_file(path: Path, **keys: Any) -> Path:
    for split, name in (("train", "train"), ("held_out", "test")):
        preference_set(split, 40).to_json(path / "data" / f"{name}.jsonl")  # type: ignore[arg-type]
    run = {
        "model_name_or_path": str(ASSETS),
        "dataset_name": str(path / "data"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_peft": True,
        "report_to": "none",
        "bf16": False,
    }
    (path / "sweep.yaml").write_text(yaml.safe_dump({"run": run, "output_dir": str(path / "sweep"), **keys}))
    return path / "sweep.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMED)} for row in found]


@needs_ray
def test_trials_on_ray_give_what_they_give_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; the better one is trained to its end, in chunks, and the other as far as ASHA lets it."""
    monkeypatch.setenv("PREFOPT_REPORT", "off")
    rates = [1e-2, 1e-3]
    pruning = {"method": "asha", "min_steps": 2}
    file = write_sweep_file(tmp_path, parameters={"learning_rate": rates}, pruning=pruning, max_at_once=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*COMMAND, str(file), "--engine", "ray"], env=environment, timeout=SECONDS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sweep = read_sweep(tmp_path / "sweep")
    assert sweep is not None
    assert {trial.status for trial in sweep.trials} <= {Status.FINISHED, Status.PRUNED}
    finished = [trial for trial in sweep.trials if trial.status is Status.FINISHED]
    assert finished
    assert not (tmp_path / "sweep" / ".ray").exists(), "what Ray wrote about itself"
    for trial in finished:
        run = trial_folder(tmp_path / "sweep", trial.name)
        assert main(["train", str(run / "run.yaml"), "--output_dir", str(tmp_path / trial.name)]) == 0
        assert rows(run) == rows(tmp_path / trial.name)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / trial.name))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "lora_B" in name)


def test_the_extra_is_named_where_ray_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFOPT_REPORT", "off")
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_sweep_file(tmp_path, parameters={"beta": [0.1]})
    assert main(["sweep", str(file), "--engine", "ray"]) == 2
    assert "pip install 'prefopt[ray]'" in capsys.readouterr().err
