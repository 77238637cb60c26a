"""Handing over to ``accelerate launch``: the command that is built, and two real ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny, standard_rows
from torch.distributed.elastic.multiprocessing import SignalException

from prefopt.cli import launch
from prefopt.cli.launch import LAUNCHED, accelerate_config_path, plan_launch
from prefopt.cli.main import main

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from worlds import start_world

TOLERANCE = 1e-6
"""Relative norm of the weights in float32: sums are taken in another order."""
NAMES = ("single_gpu", "multi_gpu", "fsdp2", "zero1", "zero2", "zero3", "cpu")
BEFORE = (sys.executable, "-m", "prefopt.cli.launch")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch, tmp_path):
    monkeypatch.delenv(LAUNCHED, raising=False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))


def test_one_process_is_not_launched():
    assert plan_launch("dpo", ["--beta", "1"], []) is None
    assert plan_launch("dpo", [], ["--num_processes", "1"]) is None


def test_a_launched_process_trains(monkeypatch):
    monkeypatch.setenv(LAUNCHED, "1")
    assert plan_launch("dpo", [], ["--num_processes", "2"]) is None


def test_processes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(launch, "_num_devices", lambda: 0)
    plan = plan_launch("tpo", ["--beta", "1", "--num_processes", "2"], ["--num_processes", "2"])
    assert plan is not None
    config = str(accelerate_config_path("cpu"))
    after = ("-m", "prefopt.cli.main", "tpo", "--beta", "1", "--num_processes", "2")
    assert plan.command == (*BEFORE, "--config_file", config, "--num_processes", "2", *after)
    assert plan.env == {LAUNCHED: "1", "ACCELERATE_USE_CPU": "true"}


def test_all_devices_where_no_number_is_given(monkeypatch):
    monkeypatch.setattr(launch, "_num_devices", lambda: 4)
    plan = plan_launch("dpo", [], ["--accelerate_config", "zero2", "--main_process_port", "0"])
    assert plan is not None
    config = str(accelerate_config_path("zero2"))
    flags = ("--config_file", config, "--main_process_port", "0", "--num_processes", "4")
    assert plan.command == (*BEFORE, *flags, "-m", "prefopt.cli.main", "dpo")
    assert plan.env == {LAUNCHED: "1"}


def test_devices_are_used_where_there_are_any(monkeypatch):
    monkeypatch.setattr(launch, "_num_devices", lambda: 2)
    plan = plan_launch("dpo", [], ["--num_processes", "2"])
    assert plan is not None
    assert str(accelerate_config_path("multi_gpu")) in plan.command


def test_accelerates_own_default_is_left_to_it(monkeypatch, tmp_path):
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\n")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "own.yaml"))
    plan = plan_launch("dpo", [], ["--num_processes", "2"])
    assert plan is not None
    assert "--config_file" not in plan.command


def test_the_last_config_wins_and_may_be_a_file(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    plan = plan_launch("cpo", [], ["--accelerate_config", "zero3", f"--accelerate-config={own}"])
    assert plan is not None
    assert plan.command[3:6] == ("--config_file", str(own), "-m")


@pytest.mark.parametrize(
    ("rest", "part"),
    [
        (["--num_proceses", "2"], "unknown option --num_proceses; did you mean '--num_processes'?"),
        (["stray"], "unknown option stray"),
        (["--accelerate_config", "zero4"], "accelerate_config='zero4': is neither a file nor one of cpu, fsdp2"),
        (["--accelerate_config"], "wants the name of a shipped config"),
    ],
)
def test_mistakes_are_named(rest, part):
    with pytest.raises(ValueError) as caught:
        plan_launch("dpo", [], rest)
    assert part in str(caught.value)


def test_a_launcher_that_is_told_to_stop_ends_as_after_that_signal(monkeypatch):
    def stopped():
        raise SignalException("told", signal.SIGTERM)

    monkeypatch.setattr("accelerate.commands.launch.main", stopped)
    assert launch.launcher() == 143


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_the_shipped_configs(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = accelerate_config_path(name)
    flags = ["--config_file", str(path), "--num_processes", "2", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    stage = args.zero_stage if args.use_deepspeed else None
    version = args.fsdp_version if args.use_fsdp else None
    expected = {"zero1": (1, None), "zero2": (2, None), "zero3": (3, None), "fsdp2": (None, 2)}
    assert (stage, version) == expected.get(name, (None, None))
    assert args.multi_gpu == (name in ("multi_gpu", "cpu"))
    assert args.mixed_precision == "no"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_begins_with_its_command(name):
    text = accelerate_config_path(name).read_text()
    assert text.startswith("# prefopt dpo --accelerate_config " + name)
    assert yaml.safe_load(text)["compute_environment"] == "LOCAL_MACHINE"


def test_no_config_is_missing():
    assert sorted(path.stem for path in launch.CONFIGS.glob("*.yaml")) == sorted(NAMES)


def test_a_rank_does_all_that_is_to_be_done_at_its_end():
    """Threads, also those of an idle pool, functions of the end and what is printed, and then no finalisation."""
    script = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from prefopt.cli.launch import leave

class Last:
    def __del__(self):
        print("finalised")

kept = Last()
idle = ThreadPoolExecutor(1)
idle.submit(int).result()
atexit.register(print, "at exit", end=" ")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread", end=" "))).start()
leave(3)
"""
    for world_size, expected in (("1", "thread at exit finalised\n"), ("2", "thread at exit ")):
        env = {**os.environ, "WORLD_SIZE": world_size}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (3, expected)


def run_command(arguments: list[str]) -> None:
    """In a process of its own."""
    assert main(arguments) == 0


@pytest.mark.distributed
def test_two_ranks_go_on_where_one_process_stopped(tmp_path: Path):
    """By `--num_processes 2 --resume_from_checkpoint true` with half the pairs on each rank."""
    rows = standard_rows(8)
    lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {save_tiny(tmp_path / 'model')}\ndataset_name: {tmp_path / 'pairs.jsonl'}\n"
        "max_steps: 3\nper_device_train_batch_size: 4\nreport_to: none\nuse_cpu: true\n"
        "save_strategy: steps\nsave_steps: 1\nmethod: cpo\nlearning_rate: 1.0e-4\n"
    )
    run = ["train", str(tmp_path / "run.yaml"), "--output_dir"]
    start_world(1, tmp_path, run_command, [*run, str(tmp_path / "alone"), "--num_processes", "1"]).finish()
    shutil.copytree(tmp_path / "alone" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    more = ["--num_processes", "2", "--main_process_port", "0", "--per_device_train_batch_size", "2"]
    more += ["--resume_from_checkpoint", "true"]
    command = [sys.executable, "-m", "prefopt.cli.main", *run, str(tmp_path / "out"), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--resume_from_checkpoint", "true"],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.5  # three steps of two pairs on each of two ranks are twelve of eight rows
    # the second rank's random numbers: not where one process was, but after it
    assert [(tmp_path / "out" / f"checkpoint-{step}" / "rng_1.json").exists() for step in (1, 3)] == [False, True]
    ours, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    vector, expected, before = (torch.cat([part.flatten() for part in w.values()]) for w in (ours, alone, start))
    assert (vector - expected).norm() <= TOLERANCE * expected.norm()
    assert (before - expected).norm() > 100 * TOLERANCE * expected.norm()
