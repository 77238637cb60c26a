"""Runs from the command line: no key or token in any file or line, no socket, and files as the umask says."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from datasets import Dataset
from tiny_models import standard_rows, tiny_model, word_tokenizer

from prefopt import CPOConfig, DPOConfig, TPOConfig

UMASK = 0o027
CANARY = "hf_CANARYcanary"
"""Every secret begins like this, whatever holds it; those of the environment look like nothing."""
PLAIN = "0123456789abcdefCANARY"
ADDRESS = f"https://somebody:{PLAIN}@data.example.org/rows?token={CANARY}Query1"
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
RUN = f"""
model_name_or_path: model
dataset_name: train.jsonl
dataset_test_split: train
output_dir: {{out}}
max_steps: 2
save_steps: 1
logging_steps: 1
eval_strategy: steps
eval_steps: 1
generate_during_eval: true
report_to: none
hub_token: {CANARY}Yaml0001
hub_model_id: somebody/model
model_init_kwargs: {{{{token: {CANARY}Nested01}}}}
run_name: {ADDRESS}
env:
  WANDB_API_KEY: {PLAIN}
  HF_TOKEN: {CANARY}Environment
"""


def command(folder: str, out: str, arguments: list[str], is_offline: bool) -> None:
    """``prefopt dpo`` in this process, which ends with it: what it says and what it asks of the network go to files."""
    from prefopt.cli.main import main

    os.umask(UMASK)
    os.chdir(folder)
    os.environ["HF_HOME"] = folder
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = is_offline
    import datasets

    datasets.config.HF_HUB_OFFLINE = is_offline
    asked = Path(folder, f"{out}.network")
    asked.touch()

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in NETWORK:
            with asked.open("a") as file:
                file.write(f"{event} {values[1:]}\n")
            raise OSError("there is no network")

    sys.addaudithook(hook)
    with open(f"{out}.said", "w", buffering=1) as said, contextlib.redirect_stdout(said):
        with contextlib.redirect_stderr(said):
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                status = main(["dpo", "--config", "run.yaml", "--output_dir", out, *arguments])
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                status = 1
        said.write(f"status {status}\n")


RUNS: dict[str, tuple[list[str], bool, int]] = {
    "offline": (["--hub_token", f"{CANARY}Flag0001"], True, 0),
    "local": ([], False, 0),
    "no such data": (["--dataset_name", ADDRESS], True, 2),
    "wrong value": (["--beta", "-1", "--run_name", f"{CANARY}Name0001"], True, 2),
    "wrong option": ([f"--hub_tokn={CANARY}Flag0002"], True, 2),
    "failure": (["--save_steps", "1", "--model_name_or_path", "broken"], True, 1),
}
"""Arguments, whether HF_HUB_OFFLINE is set, and the exit status."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_model(seed=1).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    tiny_model(seed=1).save_pretrained(folder / "broken")
    word_tokenizer().save_pretrained(folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(CANARY.encode() * 9)
    Dataset.from_dict(standard_rows(8)).to_json(folder / "train.jsonl")
    (folder / "run.yaml").write_text(RUN.format(out="out"))
    for name, (arguments, is_offline, _) in RUNS.items():
        process = processes.start(command, str(folder), name.replace(" ", "-"), arguments, is_offline)
        process.join(120)
    return folder


def files_of(folder: Path, name: str) -> list[Path]:
    stem = name.replace(" ", "-")
    found = [path for path in (folder / stem).rglob("*") if path.is_file()]
    return [*found, folder / f"{stem}.said"]


@pytest.mark.parametrize("name", RUNS)
def test_no_secret_is_written_or_said(name: str, ran: Path) -> None:
    *_, status = RUNS[name]
    files = files_of(ran, name)
    said = files[-1].read_text()
    assert f"status {status}\n" in said, said
    assert len(files) > 20 or status
    assert [str(path) for path in files if b"CANARY" in path.read_bytes()] == []


@pytest.mark.parametrize("name", RUNS)
def test_no_socket_is_opened(name: str, ran: Path) -> None:
    assert (ran / f"{name.replace(' ', '-')}.network").read_text() == ""


def test_files_are_as_the_umask_says(ran: Path) -> None:
    wrong = [
        f"{path} {path.stat().st_mode & 0o777:o}"
        for path in (ran / "offline").rglob("*")
        if path.stat().st_mode & UMASK or not path.stat().st_mode & 0o040
    ]
    assert wrong == []


def test_the_figure_of_secrets(ran: Path, figure: Callable[[str, str], None]) -> None:
    files = [path for name in RUNS for path in files_of(ran, name)]
    figure("canary tokens", f"10 places of secrets, {len(RUNS)} runs: in 0 of {len(files)} files and lines said")
    figure("offline runs", f"{len(RUNS)} runs: 0 addresses asked for, 0 sockets connected")


@pytest.mark.parametrize("config", [DPOConfig, CPOConfig, TPOConfig])
def test_no_config_shows_a_secret(config: Any, tmp_path: Path) -> None:
    """What trackers, notebooks and logs are given of it."""
    kwargs = {"token": f"{CANARY}Nested01", "deeper": [{"api_key": PLAIN}]}
    made = config(str(tmp_path), hub_token=f"{CANARY}Flag0001", model_init_kwargs=kwargs, run_name=ADDRESS)
    shown = [str(made), repr(made), made.to_json_string(), str(made.to_dict()), str(made.to_sanitized_dict())]
    assert [text for text in shown if "CANARY" in text] == []
    assert made.hub_token == f"{CANARY}Flag0001"
    assert made.model_init_kwargs == kwargs


def test_a_token_is_not_on_a_command_line_that_launchers_show() -> None:
    from prefopt.cli.launch import plan_launch

    for arguments in (["--hub_token", CANARY], [f"--hub-token={CANARY}"]):
        plan = plan_launch("dpo", ["--beta", "0.1", *arguments], ["--num_processes", "2"])
        assert plan is not None
        assert CANARY not in " ".join(plan.command)
        assert plan.env["HF_TOKEN"] == CANARY
