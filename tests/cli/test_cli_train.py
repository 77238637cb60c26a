"""From options to a trained model, for each method; the data, the model's options, the examples."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_rows, save_tiny

from prefopt.cli.main import main
from prefopt.cli.model_config import ModelConfig, ScriptArguments
from prefopt.cli.train import load_data, make_parser, make_trainer, model_options
from prefopt.data import DatasetConfig, DatasetMixtureConfig
from prefopt.trainer.config import DPOConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A folder with a train and a test file."""
    return save_rows(tmp_path / "data")


@pytest.fixture
def options(model: str, data: str, tmp_path: Path) -> list[str]:
    return [
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "1", "--report_to", "none", "--per_device_train_batch_size", "2", "--use_cpu"),
        *("--save_strategy", "no"),
    ]


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_the_command_trains_and_saves(method, options, tmp_path, capsys):
    assert main([method, *options, "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_adapter_is_trained_and_saved(options, tmp_path):
    pytest.importorskip("peft")
    assert main(["dpo", *options, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj"]) == 0
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["target_modules"]) == (2, ["q_proj"])


def test_a_run_file_trains_what_it_says(model, data, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"method: tpo\nmodel_name_or_path: {model}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\nreport_to: none\n"
        f"use_cpu: true\nsave_strategy: 'no'\ndatasets:\n  - path: {data}/train.jsonl\n  - path: {data}/test.jsonl\n"
        "test_split_size: 4\neval_strategy: steps\neval_steps: 1\nper_device_train_batch_size: 2\n"
    )
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


NAMED = ["--output_dir", "out", "--model_name_or_path", "nowhere", "--dataset_name", "nowhere.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--output_dir", "out"], "model_name_or_path: name the model"),
        (["--output_dir", "out"], "dataset_name: name the data"),
        ([*NAMED, "--beta", "-1"], "beta=-1.0 must be"),
        ([*NAMED, "--load_in_4bit", "--load_in_8bit"], "load_in_8bit=True and load_in_4bit=True"),
    ],
)
def test_mistakes_end_with_a_message(arguments, part, capsys):
    assert main(["dpo", *arguments, "--report_to", "none"]) == 2
    printed = capsys.readouterr().err
    assert part in printed
    assert "Traceback" not in printed


def test_a_broken_row_ends_with_a_message(options, data, capsys):
    path = Path(data) / "train.jsonl"
    path.write_text(path.read_text().replace('"chosen": "', '"chosen": null, "was": "', 1))
    assert main(["dpo", *options]) == 2
    assert "row 0, column 'chosen'" in capsys.readouterr().err


def parse(arguments: list[str]) -> Any:
    return make_parser("dpo").parse_args_and_config(["--output_dir", "out", "--report_to", "none", *arguments])


def test_model_options_come_from_both_and_the_explicit_one_wins():
    _, training, model, _ = parse(["--dtype", "bfloat16", "--model_revision", "v2"])
    assert model_options(model, training) == {"revision": "v2", "dtype": "bfloat16"}
    _, training, model, _ = parse(["--attn_implementation", "eager", "--model_init_kwargs", '{"dtype": "float16"}'])
    assert model_options(model, training) == {"revision": "main", "dtype": "float16", "attn_implementation": "eager"}


def test_the_trainer_gets_model_data_and_options(model, data, tmp_path):
    trainer = make_trainer("dpo", *parse(["--model_name_or_path", model, "--dataset_name", data, "--beta", "0.3"]))
    assert trainer.args.beta == 0.3
    assert trainer.args.model_init_kwargs["revision"] == "main"
    assert trainer.eval_dataset is None
    assert len(trainer.train_dataset) == 8


def test_evaluation_data_is_loaded_only_where_it_is_used(data):
    script, nothing = ScriptArguments(dataset_name=data), DatasetMixtureConfig()
    train, test = load_data(script, nothing, with_eval=False)
    assert (len(train), test) == (8, None)
    train, test = load_data(script, nothing, with_eval=True)
    assert train[0] != test[0]


def test_a_missing_split_is_named(data):
    script = ScriptArguments(dataset_name=data, dataset_test_split="dev")
    with pytest.raises(ValueError, match="'dev'"):
        load_data(script, DatasetMixtureConfig(), with_eval=True)
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=f"{data}/train.jsonl")])
    with pytest.raises(ValueError, match="test_split_size"):
        load_data(ScriptArguments(), mixture, with_eval=True)


def test_a_mixture_wins_over_a_name(data, caplog):
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=f"{data}/train.jsonl", columns=["prompt"])])
    train, _ = load_data(ScriptArguments(dataset_name="elsewhere"), mixture, with_eval=False)
    assert train.column_names == ["prompt"]
    assert "'elsewhere' is ignored" in caplog.text


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_the_example_scripts_train(method, options, tmp_path, monkeypatch):
    script = ROOT / "examples" / "scripts" / f"{method}.py"
    if not script.exists():
        pytest.skip("the examples are not installed with the package")
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_default_model_config_is_trls():
    pytest.importorskip("trl", reason="compares with TRL 1.16")
    import dataclasses

    import trl

    for ours, theirs in ((ModelConfig, trl.ModelConfig), (ScriptArguments, trl.ScriptArguments)):
        assert dataclasses.asdict(ours()) == dataclasses.asdict(theirs())
        assert [spec.name for spec in dataclasses.fields(ours)] == [spec.name for spec in dataclasses.fields(theirs)]


def test_config_type_is_the_methods():
    assert isinstance(parse([])[1], DPOConfig)
