"""The committed model and tokenizer, and the script that makes them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.quickstart import ASSETS, preference_set
from prefopt.quickstart.measure import generate, measure, sum_logps
from prefopt.quickstart.task import ASKS, WORDS, parse

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_quickstart_model.py"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


def test_assets_are_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sizes.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 0.9e6 < sizes["model.safetensors"] < 1.1e6
    assert sum(sizes.values()) < 1.2e6


def test_model_is_a_tied_llama_in_fp32(model, tokenizer):
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["Sort ascending: owl cat", "Ünïcode 猫 🐈\n\ttabs  and   spaces", "<pad"])
def test_every_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_words_are_single_tokens(tokenizer):
    for word in WORDS:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
        assert len(tokenizer(f" {word.upper()}", add_special_tokens=False)["input_ids"]) == 1


def test_answers_begin_at_a_token(tokenizer):
    for row in preference_set("train", 60):
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["chosen"], add_special_tokens=False)
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == prompt + answer["input_ids"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_model_does_either_of_two_opposites_whatever_it_is_asked(model, tokenizer, seed):
    rows = preference_set("held_out", 300, seed=seed)
    measured = measure(model, tokenizer, rows)
    assert 0.4 <= measured.accuracy <= 0.6
    assert 0.4 <= measured.pass_rate <= 0.6
    either = [answer in pair for answer, *pair in zip(measured.answers, rows["chosen"], rows["rejected"], strict=True)]
    assert sum(either) / len(either) > 0.9
    assert {parse(prompt).ask for prompt in rows["prompt"]} == ASKS.keys()


def test_sum_logps_do_not_depend_on_the_batch(model, tokenizer):
    """Against one unpadded row at a time, cross-entropy of transformers: the mean over targets times their number."""
    rows = preference_set("held_out", 12)
    batched = sum_logps(model, tokenizer, list(rows["prompt"]), list(rows["chosen"]))
    for row, value in zip(rows, batched, strict=True):
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["chosen"])["input_ids"], tokenizer.eos_token_id]
        num_targets = len(ids) - len(prompt_ids)
        labels = [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert value.item() == pytest.approx(-loss.item() * num_targets, abs=1e-4)


def test_generated_answers_do_not_depend_on_the_batch(model, tokenizer):
    prompts = list(preference_set("held_out", 12)["prompt"])
    assert generate(model, tokenizer, prompts) == sum((generate(model, tokenizer, [p]) for p in prompts), ())


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The folder of a short run of the script."""
    folder = tmp_path_factory.mktemp("trial")
    run_script("--num_steps", "3", "--folder", folder)
    return folder


def test_script_gives_the_same_files_twice(trial):
    assert "the same, bit for bit" in run_script("--check", "--num_steps", "3", "--folder", trial)


def test_script_makes_the_committed_tokenizer_and_config(trial):
    """Three steps do not make the committed weights, but everything else."""
    found = load_script().differences(trial, ASSETS)
    assert len(found) == len(load_file(ASSETS / "model.safetensors"))
    assert all(line.startswith("model.safetensors: model.") for line in found)


def test_script_check_sees_a_changed_file(trial, tmp_path):
    folder = shutil.copytree(trial, tmp_path / "changed")
    assert load_script().differences(trial, folder) == []
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<pad>", "<PAD>"))
    assert load_script().differences(trial, folder) == ["tokenizer.json: differs"]


def run_script(*options: object) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_quickstart_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
