"""Command line over YAML over default; unknown names refused with the nearest one and their line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import prefopt
from prefopt.cli.model_config import ModelConfig, ScriptArguments
from prefopt.cli.parser import PrefParser
from prefopt.data import DatasetConfig, DatasetMixtureConfig
from prefopt.trainer.config import CPOConfig, DPOConfig, TPOConfig

ALL = (ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig)
BASE = ["--output_dir", "out", "--report_to", "none"]


@pytest.fixture
def run_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def dpo(arguments: list[str]) -> DPOConfig:
    return PrefParser(DPOConfig).parse_args_and_config([*BASE, *arguments])[0]


def test_command_line_wins_over_yaml_over_default(run_file):
    path = run_file("beta: 0.3\nlearning_rate: 1e-5\n")
    made = dpo(["--config", path, "--beta", "0.2"])
    assert (made.beta, made.learning_rate, made.max_length) == (0.2, 1e-5, 1024)


def test_only_what_was_given_counts_as_set(run_file):
    made = dpo([f"--config={run_file('beta: 0.1')}", "--logging_steps", "10"])
    assert {*made.user_set} == {"beta", "logging_steps", "output_dir", "report_to"}


def test_one_parser_parses_twice(run_file):
    parser = PrefParser(DPOConfig)
    first = parser.parse_args_and_config([*BASE, "--config", run_file("beta: 0.3")])[0]
    second = parser.parse_args_and_config(BASE)[0]
    assert (first.beta, second.beta) == (0.3, 0.1)


@pytest.mark.parametrize("flag", ["--max_length", "--max-length"])
@pytest.mark.parametrize(("text", "expected"), [("7", 7), ("none", None), ("null", None)])
def test_dashes_and_none(flag, text, expected):
    assert dpo([flag, text]).max_length == expected


def test_none_for_lists_dicts_and_text():
    made = dpo(["--loss_weights", "none", "--model_init_kwargs", "null", "--report_to", "none"])
    assert (made.loss_weights, made.model_init_kwargs, made.report_to) == (None, None, [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--gradient_checkpointing", "false"], False),
        (["--no_gradient_checkpointing"], False),
        (["--no-gradient-checkpointing"], False),
    ],
)
def test_flags_that_are_on_by_default(arguments, expected):
    assert dpo(arguments).gradient_checkpointing is expected


@pytest.mark.parametrize(("arguments", "expected"), [(["--bf16"], True), (["--bf16", "false"], False)])
def test_bf16_is_a_flag(arguments, expected):
    made = dpo(arguments)
    assert made.bf16 is expected
    assert made.was_set("bf16")


def test_lists_and_json():
    made = dpo(
        ["--loss_type", "sigmoid", "bco_pair", "--loss_weights", "1.0", "0.5", "--model_init_kwargs", '{"a": 1}']
    )
    assert (made.loss_type, made.loss_weights, made.model_init_kwargs) == (
        ["sigmoid", "bco_pair"],
        [1.0, 0.5],
        {"a": 1},
    )


@pytest.mark.parametrize("config", [CPOConfig, TPOConfig])
def test_a_single_loss_stays_text(config):
    assert PrefParser(config).parse_args_and_config([*BASE, "--loss_type", "hinge"])[0].loss_type == "hinge"


def test_yaml_values_get_the_options_type(run_file):
    made = dpo(
        [
            "--config",
            run_file(
                "learning-rate: 1e-6\nmax_length: null\neval_strategy: no\nloss_type: [sigmoid, sft]\n"
                "loss_weights: [1, 0.5]\nmodel_init_kwargs: {a: 1}\ndisable_dropout: false\nrun_name: 2024\n"
            ),
        ]
    )
    assert (made.learning_rate, made.max_length, made.eval_strategy) == (1e-6, None, "no")
    assert (made.loss_type, made.loss_weights) == (["sigmoid", "sft"], [1, 0.5])
    assert (made.model_init_kwargs, made.disable_dropout, made.run_name) == ({"a": 1}, False, "2024")


@pytest.mark.parametrize(("text", "expected"), [("true", "true"), ("no", "false"), ("'true'", "true"), ("a/b", "a/b")])
def test_resuming_is_a_yes_or_a_folder(run_file, text, expected):
    assert dpo(["--config", run_file(f"resume_from_checkpoint: {text}")]).resume_from_checkpoint == expected


def test_a_single_value_for_a_list(run_file):
    assert dpo(["--config", run_file("loss_type: hinge")]).loss_type == ["hinge"]


def test_trackers_may_be_a_list_in_yaml(run_file):
    parser = PrefParser(DPOConfig)
    made = parser.parse_args_and_config(["--output_dir", "out", "--config", run_file("report_to: [tensorboard]")])[0]
    assert made.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nbta: 0.1\n", ["run.yaml:2: unknown key 'bta'", "did you mean 'beta'?"]),
        ("bta: 0.1\nsead: 1\n", ["run.yaml:1: unknown key 'bta'", "run.yaml:2: unknown key 'sead'"]),
        ("seed: 1\nbeta: high\n", ["run.yaml:2: beta: invalid float value: 'high'"]),
        ("beta: [1, 2]\n", ["run.yaml:1: beta: takes one value"]),
        ("beta: {a: 1}\n", ["run.yaml:1: beta: takes a single value"]),
        ("max_steps: true\n", ["run.yaml:1: max_steps: got True"]),
        ("truncation_mode: middle\n", ["run.yaml:1: truncation_mode: invalid choice: 'middle'"]),
        ("seed: 1\n\nbeta: -1\n", ["beta=-1 must be", "(set in", "run.yaml:3)"]),
        ("beta: 1\nseed: 2\nbeta: 2\n", ["run.yaml:3: 'beta' stands here and in line 1"]),
        ("user_set: [beta]\n", ["run.yaml:1: unknown key 'user_set'"]),
        ("- beta\n", ["must be a mapping"]),
        ("", ["must be a mapping"]),
        ("beta: [\n", ["is no valid YAML"]),
        ("env: [A]\n", ["run.yaml:1: env must be a mapping"]),
    ],
)
def test_a_bad_file_is_refused_with_its_line(run_file, text, parts):
    with pytest.raises(ValueError) as caught:
        dpo(["--config", run_file(text)])
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: there is no such file"):
        dpo(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="wants the path"):
        dpo(["--config"])


def test_unknown_flags_are_refused():
    with pytest.raises(ValueError, match=r"unknown option --bta; did you mean 'beta'\?"):
        dpo(["--bta", "1"])
    with pytest.raises(ValueError, match="unexpected argument 'stray'"):
        dpo(["stray"])


def test_flags_are_not_abbreviated():
    with pytest.raises(ValueError, match="unknown option --learning_r"):
        dpo(["--learning_r", "1"])


def test_a_wrong_value_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        dpo(["--beta", "high"])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "argument --beta: invalid float value: 'high'" in printed
    assert printed.count("\n") == 1


def test_remaining_strings_are_returned(run_file):
    path = run_file("beta: 0.2\nnum_processes: 2\nquiet: true\n")
    parser = PrefParser(DPOConfig)
    arguments = [*BASE, "--config", path, "--main_process_port", "0"]
    made, rest = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    assert made.beta == 0.2
    assert rest == ["--num_processes", "2", "--quiet", "--main_process_port", "0"]
    *_, from_file, from_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert (from_file, from_line) == (["--num_processes", "2", "--quiet"], ["--main_process_port", "0"])


def test_unknown_keys_may_be_ignored(run_file):
    parser = PrefParser(DPOConfig)
    arguments = [*BASE, "--config", run_file("num_processes: 2\nbeta: 0.2")]
    assert parser.parse_args_and_config(arguments, fail_with_unknown_args=False)[0].beta == 0.2


def test_env_block_is_set(run_file, monkeypatch):
    monkeypatch.setenv("PREFOPT_TEST_ONE", "old")
    monkeypatch.delenv("PREFOPT_TEST_TWO", raising=False)
    dpo(["--config", run_file("env:\n  PREFOPT_TEST_ONE: new\n  PREFOPT_TEST_TWO: 2\n")])
    assert (os.environ["PREFOPT_TEST_ONE"], os.environ.pop("PREFOPT_TEST_TWO")) == ("new", "2")


def test_a_mixture_in_yaml(run_file):
    path = run_file(
        "datasets:\n  - path: a.jsonl\n    fraction: 0.25\n  - path: b\n    split: test\n"
        "    columns: [prompt, chosen]\n    fraction: 0.75\ntest_split_size: 16\nstreaming: false\n"
    )
    *_, mixture = PrefParser(ALL).parse_args_and_config([*BASE, "--config", path])
    assert mixture.datasets == [
        DatasetConfig(path="a.jsonl", fraction=0.25),
        DatasetConfig(path="b", split="test", columns=["prompt", "chosen"], fraction=0.75),
    ]
    assert mixture.test_split_size == 16


def test_every_dataclass_gets_its_own():
    script, training, model, mixture = PrefParser(ALL).parse_args_and_config(
        [*BASE, "--dataset_name", "data", "--lora_r", "4", "--use_peft", "--beta", "0.5"]
    )
    assert (script.dataset_name, training.beta, model.lora_r, model.use_peft) == ("data", 0.5, 4, True)
    assert mixture.datasets == []


def test_a_required_option_may_come_from_yaml(run_file):
    @dataclass
    class Needed:
        size: int

    parser = PrefParser([Needed])
    assert parser.parse_args_and_config(["--config", run_file("size: 3")])[0].size == 3


def test_a_field_called_config_is_refused():
    @dataclass
    class Clash:
        config: str = ""

    with pytest.raises(ValueError, match="Clash has a field 'config'"):
        PrefParser(Clash)


@pytest.mark.parametrize("config", [DPOConfig, CPOConfig, TPOConfig])
def test_transformers_own_parser_takes_the_configs(config):
    made = HfArgumentParser(config).parse_args_into_dataclasses([*BASE, "--beta", "0.2"])[0]
    assert (made.beta, made.gradient_checkpointing) == (0.2, True)


def test_all_help_can_be_printed():
    text = PrefParser(ALL).format_help()
    assert "less memory, more time" in " ".join(text.split())
    assert "user_set" not in text


def test_trls_name():
    assert prefopt.TrlParser is prefopt.PrefParser is PrefParser
