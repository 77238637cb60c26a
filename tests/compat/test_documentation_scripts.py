"""The ways in which documentation and examples of TRL use the three trainers, with the import line changed.

Hub names are a local model and local files. Each test is one script; what a script saves is checked at its end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from parameters import ROWS
from tiny_models import CHAT_TEMPLATE, conversational_rows, standard_rows, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import prefopt
from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, TPOConfig, TPOTrainer


def write(folder: Path, name: str, rows: dict[str, list[Any]]) -> str:
    Dataset.from_dict(rows).to_json(folder / name)
    return str(folder / name)


@pytest.fixture
def pair_file(tmp_path: Path) -> str:
    return write(tmp_path, "pairs.jsonl", conversational_rows(ROWS))


@pytest.fixture
def triple_file(tmp_path: Path) -> str:
    return write(tmp_path, "triples.jsonl", conversational_rows(ROWS, gold=True))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str) -> None:
    """Scripts leave out most options: no trackers, and their output lands in a temporary working directory."""
    monkeypatch.setenv("WANDB_DISABLED", "true")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(file: str) -> Dataset:
    return load_dataset("json", data_files=file, split="train")


def check_trained(trainer: Any) -> None:
    """Three epochs of seventeen rows by eight, a summary, a checkpoint that loads, a card."""
    assert trainer.state.global_step == 9
    assert trainer.state.log_history[-1]["train_loss"] > 0
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-9"
    assert (checkpoint / "trainer_state.json").exists()
    assert (Path(trainer.args.output_dir) / "README.md").exists() or (checkpoint / "README.md").exists()


# -- DPO ------------------------------------------------------------------------------------------------------------


def test_dpo_quick_start(model: str, pair_file: str) -> None:
    trainer = DPOTrainer(model=model, train_dataset=load_dataset("json", data_files=pair_file, split="train"))
    trainer.train()
    check_trained(trainer)
    assert Path(trainer.args.output_dir).name == f"{Path(model).name}-DPO"
    assert AutoModelForCausalLM.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-9")


@pytest.mark.parametrize("shape", ["standard", "standard implicit", "conversational", "conversational implicit"])
def test_dpo_expected_formats(shape: str, model: str) -> None:
    prompt: Any = "mama papa" if "standard" in shape else [{"role": "user", "content": "mama papa"}]
    good: Any = " baba" if "standard" in shape else [{"role": "assistant", "content": "baba"}]
    bad: Any = " dada" if "standard" in shape else [{"role": "assistant", "content": "dada"}]
    example = {"prompt": prompt, "chosen": good, "rejected": bad}
    if "implicit" in shape:
        example = {"chosen": prompt + good, "rejected": prompt + bad}
    trainer = DPOTrainer(model, train_dataset=Dataset.from_list([example] * ROWS))
    trainer.train()
    check_trained(trainer)


def test_dpo_preprocessed_by_a_map(model: str) -> None:
    """A set in another shape, brought into ours by a function."""
    rows = standard_rows(ROWS)
    dataset = Dataset.from_dict({"input": rows["prompt"], "accepted": rows["chosen"], "rejected": rows["rejected"]})

    def to_messages(example: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": example["input"]}],
            "chosen": [{"role": "assistant", "content": example["accepted"]}],
            "rejected": [{"role": "assistant", "content": example["rejected"]}],
        }

    dataset = dataset.map(to_messages, remove_columns=["input", "accepted"])
    trainer = DPOTrainer(model, train_dataset=dataset)
    trainer.train()
    check_trained(trainer)


def test_dpo_mixed_preference_optimisation(model: str, pair_file: str) -> None:
    training_args = DPOConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    trainer = DPOTrainer(model, args=training_args, train_dataset=read(pair_file))
    trainer.train()
    check_trained(trainer)
    assert "nll_loss" in trainer.state.log_history[-1]


def test_dpo_model_initialisation(model: str, pair_file: str) -> None:
    training_args = DPOConfig(model_init_kwargs={"dtype": torch.bfloat16})
    trainer = DPOTrainer(model, args=training_args, train_dataset=read(pair_file))
    trainer.train()
    check_trained(trainer)
    assert trainer.model.dtype == torch.bfloat16


def test_dpo_adapters(model: str, pair_file: str, tmp_path: Path) -> None:
    """A new adapter, then more training of the one that was saved."""
    peft = pytest.importorskip("peft")
    dataset = read(pair_file)
    args = DPOConfig(learning_rate=1e-5)
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, peft_config=peft.LoraConfig())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), is_trainable=True)
    trainer = DPOTrainer(model=again, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 9


def test_dpo_tools(model: str) -> None:
    """Conversations that call tools: a column of schemas beside the messages."""
    schema = {"type": "function", "function": {"name": "kaka", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "kaka", "arguments": "{}"}}
    row = {
        "prompt": [{"role": "user", "content": "mama"}],
        "chosen": [
            {"role": "assistant", "content": "baba", "tool_calls": [call]},
            {"role": "tool", "name": "kaka", "content": "lala"},
            {"role": "assistant", "content": "bebe"},
        ],
        "rejected": [{"role": "assistant", "content": "dada"}],
        "tools": json.dumps([schema]),
    }
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if tools %}system {{ tools[0].function.name }} {% endif %}" + CHAT_TEMPLATE
    trainer = DPOTrainer(model, train_dataset=Dataset.from_list([row] * ROWS), processing_class=tokenizer)
    assert tokenizer.convert_tokens_to_ids("kaka") in trainer.train_dataset[0]["prompt_ids"]
    trainer.train()
    check_trained(trainer)


def test_dpo_collator_of_ones_own(model: str, pair_file: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    data_collator = prefopt.DataCollatorForPreference(pad_token_id=tokenizer.eos_token_id)
    trainer = DPOTrainer(model, data_collator=data_collator, train_dataset=read(pair_file))
    trainer.train()
    check_trained(trainer)
    assert trainer.data_collator is data_collator


def test_dpo_script_with_a_parser(model: str, pair_file: str) -> None:
    """The example script: three groups of arguments, a quantisation and an adapter config where asked for."""
    parser = prefopt.TrlParser((prefopt.ScriptArguments, DPOConfig, prefopt.ModelConfig))
    command = f"""--dataset_name {Path(pair_file).parent} --model_name_or_path {model} --output_dir from_script
        --learning_rate 5.0e-6 --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 4
        --gradient_checkpointing --eval_strategy no --no_remove_unused_columns --use_peft --lora_r 4 --lora_alpha 8"""
    script_args, training_args, model_args = parser.parse_args_and_config(command.split())
    model_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    quantization_config = prefopt.get_quantization_config(model_args)
    if quantization_config is not None:
        model_kwargs |= {"device_map": prefopt.get_kbit_device_map(), "quantization_config": quantization_config}
    loaded = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = load_dataset(script_args.dataset_name, data_files=Path(pair_file).name)
    trainer = DPOTrainer(
        loaded,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=None,
        processing_class=tokenizer,
        peft_config=prefopt.get_peft_config(model_args),
    )
    trainer.train()
    check_trained(trainer)
    trainer.save_model(training_args.output_dir)
    assert (Path(training_args.output_dir) / "adapter_model.safetensors").exists()


# -- CPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "simpo", "cpo_alpha": 0.0},
        {"loss_type": "simpo", "cpo_alpha": 0.5},
        {"loss_type": "alphapo", "alpha": 0.25, "simpo_gamma": 0.1},
        {"loss_type": "ipo", "alpha": 0.25},
    ],
    ids=["CPO", "SimPO", "CPO-SimPO", "AlphaPO", "IPO with alpha"],
)
def test_cpo_quick_start_and_variants(options: dict[str, Any], model: str, pair_file: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    train_dataset = read(pair_file)
    training_args = CPOConfig(output_dir="tiny-CPO", **options)
    trainer = CPOTrainer(model=loaded, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
    trainer.train()
    check_trained(trainer)


def test_cpo_experts(model_folder: dict[str, str], pair_file: str) -> None:
    """The auxiliary loss, switched on and weighted in the model's config."""
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.001}
    loaded = AutoModelForCausalLM.from_pretrained(model_folder["qwen3_moe"], **options)
    trainer = CPOTrainer(loaded, CPOConfig("moe-CPO"), train_dataset=read(pair_file), processing_class=word_tokenizer())
    trainer.train()
    check_trained(trainer)
    assert trainer.state.log_history[-1]["aux_loss"] > 0


def test_cpo_script_with_a_parser(model: str, pair_file: str) -> None:
    parser = HfArgumentParser((prefopt.ScriptArguments, CPOConfig, prefopt.ModelConfig))
    command = f"""--dataset_name {Path(pair_file).parent} --model_name_or_path {model} --loss_type simpo --cpo_alpha 0.0
        --simpo_gamma 1.0 --per_device_train_batch_size 8 --num_train_epochs 3 --learning_rate 8e-6 --warmup_steps 2
        --output_dir from_script --no_remove_unused_columns --report_to none --use_peft --lora_r 16 --lora_alpha 16"""
    script_args, training_args, model_args = parser.parse_args_into_dataclasses(command.split())
    assert training_args.loss_type == "simpo"
    loaded = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    dataset = load_dataset(script_args.dataset_name, data_files=Path(pair_file).name)
    trainer = CPOTrainer(
        loaded,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        processing_class=tokenizer,
        peft_config=prefopt.get_peft_config(model_args),
    )
    trainer.train()
    check_trained(trainer)


# -- TPO ------------------------------------------------------------------------------------------------------------


def test_tpo_quick_start(model: str, triple_file: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    training_args = TPOConfig(output_dir="tiny-TPO")
    trainer = TPOTrainer(model=loaded, args=training_args, processing_class=tokenizer, train_dataset=read(triple_file))
    trainer.train()
    check_trained(trainer)


def test_tpo_triples_from_scored_completions(model: str) -> None:
    """The best of several completions is gold, the second chosen, the last rejected."""
    words = ["fafa", "baba", "dada", "gaga"]
    scored = [{"response": word, "overall_score": 10 - rank} for rank, word in enumerate(words)]
    dataset = Dataset.from_list([{"instruction": "mama papa", "completions": scored}] * ROWS)

    def to_triple(example: dict[str, Any]) -> dict[str, Any]:
        best = sorted(example["completions"], key=lambda completion: -completion["overall_score"])
        turn = {name: best[place]["response"] for name, place in [("reference", 0), ("chosen", 1), ("rejected", -1)]}
        messages = {name: [{"role": "assistant", "content": content}] for name, content in turn.items()}
        return {"prompt": [{"role": "user", "content": example["instruction"]}], **messages}

    trainer = TPOTrainer(model, train_dataset=dataset.map(to_triple, remove_columns=dataset.column_names))
    trainer.train()
    check_trained(trainer)


@pytest.mark.parametrize("options", ["--loss_type sigmoid", "--loss_type tpo-l --tpo_l_gamma 5.4"])
def test_tpo_script_with_a_parser(options: str, model: str, triple_file: str) -> None:
    parser = HfArgumentParser((prefopt.ScriptArguments, TPOConfig, prefopt.ModelConfig))
    command = f"""--dataset_name {Path(triple_file).parent} --model_name_or_path {model} --beta 0.01 --tpo_alpha 1.0
        --learning_rate 5e-7 --output_dir from_script --no_remove_unused_columns --report_to none {options}"""
    script_args, training_args, model_args = parser.parse_args_into_dataclasses(command.split())
    loaded = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    dataset = load_dataset(script_args.dataset_name, data_files=Path(triple_file).name)
    trainer = TPOTrainer(
        loaded,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        processing_class=tokenizer,
        peft_config=prefopt.get_peft_config(model_args),
    )
    trainer.train()
    check_trained(trainer)
