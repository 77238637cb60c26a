"""A run goes on as the run it was: other numbers are refused by name, harmless changes pass, and act."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from short_runs import dataset, log_rows, trainer, weights
from tiny_models import save_tiny, standard_rows, tiny_model, word_tokenizer
from transformers import TrainerCallback
from vision_models import PICTURES, processor_of, tiny_vision

from prefopt import CPOConfig, DPOConfig, DPOTrainer, TPOConfig
from prefopt.cli.main import main
from prefopt.trainer.saving import continuation
from prefopt.trainer.saving.changes import CHANGES, Change, change_of
from prefopt.trainer.saving.continuation import check_continuation, write_arguments
from prefopt.trainer.saving.facts import row_hashes

STEPS = 4
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, **options})


BASES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "lora": lambda: {"peft_config": lora()},
    "pattern": lambda: {"peft_config": lora(alpha_pattern={"q_proj": 8})},
    "buffer": lambda: {"peft_config": lora(), "model": with_buffer(1)},
    "cpo": lambda: {"method": "cpo"},
    "stream": lambda: {"rows": dataset().to_iterable_dataset()},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Of a kind of run its checkpoint after 2 of 4 steps, and the run."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(base: str) -> tuple[Path, Any]:
        if base not in made:
            folder = tmp_path_factory.mktemp(base)
            run = trainer(folder, **{**SAVED, **BASES[base]()})
            run.train()
            made[base] = folder / "checkpoint-2", run
        return made[base]

    return of


@pytest.fixture
def going_on(checkpoints: Any, tmp_path: Path) -> Callable[..., Any]:
    """The same run again with changes, and the folder of its checkpoint."""

    def again(base: str = "full", **changes: Any) -> tuple[Any, Path]:
        return trainer(tmp_path, **{**SAVED, **BASES[base](), **changes}), checkpoints(base)[0]

    return again


# -- every option is judged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DPOConfig, CPOConfig, TPOConfig], ids=lambda config: config.__name__)
def test_every_option_is_judged(config: type) -> None:
    assert {field.name for field in dataclasses.fields(config)} <= set(CHANGES)


def test_every_option_is_in_the_docs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "resuming.md").read_text()
    missing = [name for name, change in CHANGES.items() if change is not Change.FREE and f"`{name}`" not in page]
    assert missing == []


def test_an_option_that_nobody_has_judged_is_refused() -> None:
    assert change_of("an_option_of_the_future") is Change.REFUSED


# -- what is refused ------------------------------------------------------------------------------------------------


def with_buffer(value: int) -> Any:
    """A model that keeps a weight where quantized ones do."""
    model = tiny_model(seed=1)
    model.model.layers[0].mlp.register_buffer("qweight", torch.full((4, 4), value, dtype=torch.int32))
    return model


def changed_row(number: int) -> Dataset:
    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": f"{row['chosen']} bobo"} if index == number else {}

    return dataset().map(change, with_indices=True)


def swapped() -> Dataset:
    return dataset().select([1, 0, *range(2, 40)])


def other_template() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


REFUSED: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
    "beta": ("full", lambda: {"beta": 0.3}, r"beta +0\.1 +0\.3"),
    "loss": ("full", lambda: {"loss_type": "hinge"}, r"loss_type +\['sigmoid'\] +\['hinge'\]"),
    "seed": ("full", lambda: {"seed": 1}, "seed +42 +1"),
    "learning rate": ("full", lambda: {"learning_rate": 1e-3}, r"learning_rate +0\.01 +0\.001"),
    "optimizer": ("full", lambda: {"optim": "sgd"}, "optim +adamw_torch_fused +sgd"),
    "schedule": ("full", lambda: {"lr_scheduler_type": "cosine"}, "lr_scheduler_type +linear +cosine"),
    "dropout": ("full", lambda: {"disable_dropout": False}, "disable_dropout +True +False"),
    "precision": ("full", lambda: {"bf16": True}, "precision +no +bf16"),
    "pairs per step": ("full", lambda: {"per_device_train_batch_size": 2}, r"pairs per step \(.*\) +4 +2"),
    "moving reference": ("full", lambda: {"sync_ref_model": True}, "reference: moves +False +True"),
    "row order": ("full", lambda: {"rows": swapped()}, "data: rows +40 rows +the same in another order, from row 0 on"),
    "one row": ("full", lambda: {"rows": changed_row(17)}, "data: rows +40 rows +1 of them changed: row 17"),
    "fewer rows": (
        "full",
        lambda: {"rows": dataset().select(range(1, 40))},
        "data: rows +40 rows +39 rows, 1 gone or changed",
    ),
    "a column": (
        "full",
        lambda: {"rows": dataset().add_column("weight", [2.0] * 40)},
        "data: columns beside the tokens +none +weight",
    ),
    "truncation": ("full", lambda: {"max_length": 9}, r"(?s)data: rows .*max_length +1024 +9"),
    "architecture": (
        "cpo",
        lambda: {"model": tiny_model(seed=1, num_hidden_layers=1)},
        "model: config: num_hidden_layers +2 +1",
    ),
    "weights of the reference": ("full", lambda: {"model": tiny_model(seed=2)}, "reference: weights"),
    "reference model": ("full", lambda: {"ref_model": tiny_model(seed=3)}, "reference: weights"),
    "adapter's rank": ("lora", lambda: {"peft_config": lora(r=2)}, "model: adapters: default: r +4 +2"),
    "adapter's modules": (
        "lora",
        lambda: {"peft_config": lora(target_modules=["q_proj"])},
        "model: adapters: default: target_modules",
    ),
    "an adapter's pattern": (
        "lora",
        lambda: {"peft_config": lora(alpha_pattern={"q_proj": 256})},
        "model: adapters: default: alpha_pattern: q_proj +- +256",
    ),
    "no pattern any more": (
        "pattern",
        lambda: {"peft_config": lora()},
        "model: adapters: default: alpha_pattern: q_proj +8 +-",
    ),
    "quantized weights": ("buffer", lambda: {"model": with_buffer(2)}, "model: weights that are not trained"),
    "no adapter": ("lora", lambda: {"peft_config": None}, "model: adapters: names +default +none"),
    "weights under the adapter": ("lora", lambda: {"model": tiny_model(seed=2)}, "weights that are not trained"),
    "a stream's rows": (
        "stream",
        lambda: {"rows": changed_row(3).to_iterable_dataset()},
        "data: rows +8 rows +1 of them changed: row 3",
    ),
    "a stream's truncation": (
        "stream",
        lambda: {"rows": dataset().to_iterable_dataset(), "max_length": 200},
        "max_length +1024 +200",
    ),
    "a set for a stream": ("stream", lambda: {"rows": dataset()}, "data: kind +stream +set"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_numbers_are_refused_by_name(change: str, going_on: Any) -> None:
    base, changes, named = REFUSED[change]
    run, checkpoint = going_on(base, **changes())
    with pytest.raises(ValueError, match=named) as error:
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 0
    assert "allow_changes=True" in str(error.value)


def test_the_reference_is_not_the_trained_model(going_on: Any, checkpoints: Any) -> None:
    """A user who gives the checkpoint as the model would train against what was trained."""
    folder, _ = checkpoints("full")
    run, checkpoint = going_on(model=str(folder))
    with pytest.raises(ValueError, match="must be the one which the run was started with"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_a_users_optimizer_is_another_one(going_on: Any) -> None:
    model = tiny_model(seed=1)
    run, checkpoint = going_on(model=model)
    run.given_optimizers = torch.optim.SGD(model.parameters(), lr=0.1), None
    with pytest.raises(ValueError, match=r"optimizer: kind +of the options +torch.optim.sgd.SGD"):
        check_continuation(run, checkpoint)


def test_the_cause_of_other_rows_is_named(tmp_path: Path) -> None:
    """Where rows differ, the tokenizer and the template are looked at too."""
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in standard_rows(8)["prompt"]],
            **{
                side: [[{"role": "assistant", "content": text}] for text in standard_rows(8)[side]]
                for side in ("chosen", "rejected")
            },
        }
    )
    begun = trainer(tmp_path, rows=rows, **SAVED)
    begun.train()
    again = trainer(tmp_path, rows=rows, **SAVED)
    again.processing_class.chat_template = word_tokenizer().chat_template.replace("assistant", "system")
    again.train_dataset = again.prepared(rows, "train")
    with pytest.raises(ValueError, match=r"(?s)data: rows .*processing: chat template"):
        check_continuation(again, tmp_path / "checkpoint-2")


# -- what is allowed ------------------------------------------------------------------------------------------------


HARMLESS: dict[str, dict[str, Any]] = {
    "logging": {"logging_steps": 3, "run_name": "again", "log_level": "error"},
    "saving": {"save_steps": 1, "save_total_limit": 1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3},
    "workers": {"dataloader_num_workers": 2, "dataset_num_proc": 1},
    "split": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "layout": {"layout": "padded"},
    "tokens": {"tokens_per_batch": 60},
    "memory": {"gradient_checkpointing": True},
    "hub": {"hub_model_id": "a/b", "hub_strategy": "end"},
    "bad rows": {"on_bad_row": "error"},
    "longest row": {"max_length": 200},
    "precomputed reference": {"precompute_ref_log_probs": True},
}
ROUNDING = 1e-5
"""Relative: other layouts and splits sum in another order; another number shows as 1e-3 and more."""


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_changes_pass_and_change_nothing(
    change: str, going_on: Any, checkpoints: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = HARMLESS[change]
    eval_dataset = dataset(4, seed=9) if change == "evaluation" else None
    run, checkpoint = going_on(eval_dataset=eval_dataset, **options)
    caplog.clear()
    check_continuation(run, checkpoint)
    assert caplog.text == ""
    run.train(resume_from_checkpoint=str(checkpoint))
    expected = weights(checkpoints("full")[1].model)
    assert float((weights(run.model) - expected).norm() / expected.norm()) < ROUNDING


def test_new_intervals_act(going_on: Any, tmp_path: Path) -> None:
    run, checkpoint = going_on(
        save_steps=1, logging_steps=4, eval_steps=3, eval_strategy="steps", eval_dataset=dataset(4)
    )
    run.train(resume_from_checkpoint=str(checkpoint))
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-4"]
    new = [row for row in run.state.log_history if row["step"] > 2]
    assert [row["step"] for row in new if "loss" in row] == [4]
    assert next(row["step"] for row in new if "eval_loss" in row) == 3


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_more_steps_pass_and_the_schedule_is_said(
    scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**SAVED, "lr_scheduler_type": scheduler}
    trainer(tmp_path, **options).train()
    longer = trainer(tmp_path, **{**options, "max_steps": 6})
    with caplog.at_level(logging.WARNING, "prefopt"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert longer.state.global_step == 6
    assert ("max_steps was 4 and is 6: the schedule (linear)" in caplog.text) == (scheduler == "linear")


class Rates(TrainerCallback):
    """The learning rates that steps are taken with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"learning_rate": 1e-3, "weight_decay": 0.1}, [1e-3 / 2, 1e-3 / 4]),
        ({"learning_rate": 1e-3, "lr_scheduler_type": "constant"}, [1e-3, 1e-3]),
        ({"optim": "sgd", "learning_rate": 0.5}, [0.5 / 2, 0.5 / 4]),
        ({"beta": 0.3}, [1e-2 / 2, 1e-2 / 4]),
    ],
    ids=["rate", "schedule", "optimizer", "beta"],
)
def test_a_change_that_is_allowed_is_said_and_acts(
    changes: dict[str, Any], rates: list[float], going_on: Any, checkpoints: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Rates()
    run, checkpoint = going_on(**changes, allow_changes=True, callbacks=[seen])
    with caplog.at_level(logging.WARNING, "prefopt"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert all(f"\n  {name} " in caplog.text for name in changes)
    assert seen.rates == rates
    assert run.optimizer.param_groups[0]["weight_decay"] == changes.get("weight_decay", 0.0)
    assert not torch.equal(weights(run.model), weights(checkpoints("full")[1].model))


def test_other_versions_are_said(going_on: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    run, checkpoint = going_on()
    monkeypatch.setattr(continuation, "versions", lambda packages: dict.fromkeys(packages, "999.0"))
    with caplog.at_level(logging.WARNING, "prefopt"):
        check_continuation(run, checkpoint)
    assert "-> 999.0" in caplog.text


def test_entries_of_configs_count_under_the_same_versions_only(going_on: Any, monkeypatch: Any) -> None:
    """Another version of a library has entries of its own."""
    run, checkpoint = going_on()
    run.model.config.new_entry = 1
    with pytest.raises(ValueError, match=r"model: config: new_entry +- +1"):
        check_continuation(run, checkpoint)
    monkeypatch.setattr(continuation, "versions", lambda packages: dict.fromkeys(packages, "999.0"))
    check_continuation(run, checkpoint)


def test_rows_and_weights_are_read_once(going_on: Any, monkeypatch: Any) -> None:
    """What a checkpoint is compared with is what the next ones hold."""
    run, checkpoint = going_on()
    reads: list[int] = []
    monkeypatch.setattr(
        "prefopt.trainer.saving.continuation.row_hashes", lambda rows: reads.append(1) or row_hashes(rows)
    )
    run.train(resume_from_checkpoint=str(checkpoint))
    assert reads == [1]
    run.train()
    assert reads == [1, 1]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_vision_language_run_goes_on(family: str, tmp_path: Path) -> None:
    """The tokens that training aligns with the tokenizer's are in the config of its part for text."""
    text = {"chosen": "A cat.", "rejected": "No."}
    rows = [
        {
            "images": [PICTURES[0]],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{number}?"}]}],
            **{
                side: [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                for side, answer in text.items()
            },
        }
        for number in range(4)
    ]

    def run(folder: str) -> Any:
        processor = processor_of(family)
        options = {**SAVED, "per_device_train_batch_size": 1, "report_to": "none", "learning_rate": 1e-2}
        args = DPOConfig(str(tmp_path / folder), **options)
        model = tiny_vision(family, processor)
        return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log_rows(resumed) == log_rows(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_run_goes_on_twice(tmp_path: Path, going_on: Any) -> None:
    """What a checkpoint of a resumed run says is what the first one began with; a moved reference is none of it."""
    moved = {**SAVED, "sync_ref_model": True, "ref_model_sync_steps": 1, "save_steps": 1}
    for step in range(3):
        run = trainer(tmp_path, **moved)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}") if step else None)


@pytest.mark.parametrize(
    "config",
    [
        lambda: lora(use_dora=True),
        lambda: lora(init_lora_weights=False),
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["DoRA", "random LoRA", "prompt tuning"],
)
def test_random_numbers_of_an_adapter_are_those_of_the_first_process(config: Any, tmp_path: Path) -> None:
    """A second process draws others: both the policy's and the reference's come from the checkpoint."""

    def run(folder: str, seed: int) -> Any:
        model = tiny_model(seed=1)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config())
        return trainer(tmp_path / folder, model=adapted, **{**SAVED, "save_steps": 1, "max_steps": 3})

    whole, resumed = run("whole", 3), run("resumed", 4)
    assert not torch.equal(weights(whole.model), weights(resumed.model))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert log_rows(resumed) == log_rows(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_the_command_line_goes_on_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    columns = standard_rows(8)
    lines = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    options = ["dpo", "--model_name_or_path", save_tiny(tmp_path / "model"), "--report_to", "none", "--use_cpu"]
    options += ["--dataset_name", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "out")]
    options += ["--per_device_train_batch_size", "4", "--save_steps", "1", "--resume_from_checkpoint", "true"]
    assert main([*options, "--max_steps", "1"]) == 0
    assert main([*options, "--max_steps", "2"]) == 0
    assert main([*options, "--max_steps", "3", "--beta", "0.3"]) == 2
    said = capsys.readouterr().err
    assert "beta  0.1  0.3" in said
    assert "Traceback" not in said
    assert main([*options, "--max_steps", "3", "--beta", "0.3", "--allow_changes"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3)}


# -- options as JSON ------------------------------------------------------------------------------------------------


SECRET = "hf_CANARY0123456789"


@pytest.fixture
def secrets() -> DPOConfig:
    return DPOConfig(
        "out",
        report_to="none",
        hub_token=SECRET,
        run_name=f"https://me:{SECRET}@host/run?token=x{SECRET}",
        model_init_kwargs={"token": SECRET, "nested": {"list": [{"api_key": SECRET}]}, "revision": "v1"},
        pad_token="<unk>",
    )


@pytest.mark.filterwarnings("ignore:.*pad_token is deprecated")
def test_no_secret_is_written(secrets: DPOConfig, tmp_path: Path) -> None:
    write_arguments(secrets, tmp_path)
    text = (tmp_path / "training_args.json").read_text()
    assert "CANARY" not in text
    back = json.loads((tmp_path / "training_args.json").read_text())
    assert (back["pad_token"], back["model_init_kwargs"]["revision"]) == ("<unk>", "v1")
    assert secrets.hub_token == secrets.model_init_kwargs["token"] == SECRET


def test_every_option_is_written(tmp_path: Path) -> None:
    config = TPOConfig("out", beta=0.25, report_to="none", lr_scheduler_kwargs={"a": 1})
    write_arguments(config, tmp_path)
    back = json.loads((tmp_path / "training_args.json").read_text())
    assert set(back) == {field.name for field in dataclasses.fields(TPOConfig) if field.init}
    assert (back["beta"], back["lr_scheduler_kwargs"]) == (0.25, {"a": 1})
    assert TPOConfig(**{**back, "hub_token": None}).beta == 0.25


def test_a_checkpoint_holds_what_it_began_with(checkpoints: Any) -> None:
    folder, _ = checkpoints("full")
    state = json.loads((folder / "continuation.json").read_text())
    assert "options" in json.dumps(state)
    assert json.loads((folder / "training_args.json").read_text())["beta"] == 0.1
