"""TR-DPO and BEMA in real runs: which weights move, what is compared with them, and what a checkpoint keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from short_runs import dataset, log_rows, trainer, weights
from tiny_models import standard_rows, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from prefopt import BEMACallback
from prefopt.reference import named_weights

ROUNDING = {"rtol": 1e-6, "atol": 1e-7}
"""One mixture of float32 numbers."""
SAME_REWARDS = {"rel": 1e-4, "abs": 1e-5}
"""beta times differences of sums of log-probs in float32, in batches of other layouts."""
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
SAVED = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
TR_DPO: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1}


class Diary(TrainerCallback):
    """The weights of policy and reference before each step, and at the end."""

    def __init__(self) -> None:
        self.policy: list[dict[str, torch.Tensor]] = []
        self.reference: list[dict[str, torch.Tensor]] = []
        self.run: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.policy.append(copied(named_weights(self.run.model)))
        self.reference.append(copied(self.run.model_reference.weights()))

    on_train_end = on_step_begin


def copied(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in tensors.items()}


def moving(folder: Path, **options: Any) -> tuple[Any, Diary]:
    """A trained run of three steps on the same four rows, and its diary."""
    diary = Diary()
    torch.manual_seed(3)
    options = {**TR_DPO, "max_steps": 3, "count": 4, **options}
    diary.run = trainer(folder, callbacks=[diary, *options.pop("callbacks", [])], **options)
    diary.run.train()
    return diary.run, diary


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"peft_config": LORA},
    "modules_to_save": {"peft_config": SAVED},
    "a given reference": {"ref_model": tiny_model(seed=8)},
    "a separate copy with adapters": {"peft_config": LORA, "force_use_ref_model": True},
    "accumulating": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padded": {"layout": "padded"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_by_hand(kind: str, tmp_path: Path) -> None:
    """r_k = 0.6 w_k + 0.4 r_(k-1) after every optimizer step, and step k + 1 is compared with r_k."""
    options = copy.deepcopy(KINDS[kind])
    start = copied(named_weights(options["ref_model"])) if "ref_model" in options else None
    run, diary = moving(tmp_path, **options)
    expected = diary.reference[0]
    if start is not None:
        torch.testing.assert_close(expected, start)
    for policy, reference in zip(diary.policy[1:], diary.reference[1:], strict=True):
        expected = {name: 0.6 * policy[name] + 0.4 * old for name, old in expected.items()}
        for name, tensor in reference.items():
            torch.testing.assert_close(tensor, expected[name], **ROUNDING)
    assert any(not torch.equal(diary.reference[1][n], diary.reference[2][n]) for n in expected)
    trained = {name for name, weight in named_weights(run.model).items() if weight.requires_grad}
    assert trained <= set(expected)
    frozen = [name for name in expected if name not in trained]
    assert all(torch.equal(diary.reference[0][name], diary.reference[3][name]) for name in frozen)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_a_step_is_compared_with_the_reference_as_it_is_then(kind: str, tmp_path: Path) -> None:
    """The rewards of each step, and of the evaluation after it, are those of the weights in the diary."""
    options = {**copy.deepcopy(KINDS[kind]), "eval_dataset": dataset(4), "eval_strategy": "steps", "eval_steps": 1}
    run, diary = moving(tmp_path, **options)
    trained = [row["rewards/chosen"] for row in run.state.log_history if "rewards/chosen" in row]
    evaluated = [row["eval_rewards/chosen"] for row in run.state.log_history if "eval_rewards/chosen" in row]

    def rewards(step: int) -> float:
        policy, reference = copy.deepcopy(run.model), copy.deepcopy(run.model)
        for model, values in ((policy, diary.policy[step]), (reference, diary.policy[step] | diary.reference[step])):
            with torch.no_grad():
                for name, weight in named_weights(model).items():
                    weight.copy_(values[name])
        fresh = trainer(tmp_path, model=policy, ref_model=reference, eval_dataset=dataset(4))
        return fresh.evaluate()["eval_rewards/chosen"]

    found = [rewards(step) for step in range(4)]
    assert trained[:3] == pytest.approx(found[:3], **SAME_REWARDS)
    assert evaluated == pytest.approx(found[1:], **SAME_REWARDS)
    assert abs(found[2]) > 1e-3


# -- a reference without adapters follows a policy with adapters ---------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        SAVED,
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True),
        LoraConfig(r=2, target_parameters=["mlp.gate_proj.weight"]),
        IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["LoRA", "modules_to_save", "DoRA", "target_parameters", "IA3"],
)
def test_a_given_reference_follows_the_merged_adapter(config: Any, tmp_path: Path) -> None:
    start = tiny_model(seed=8)
    reference = copy.deepcopy(start)
    run, _ = moving(tmp_path, ref_model=reference, peft_config=config, max_steps=1, learning_rate=0.1)
    merged = named_weights(copy.deepcopy(run.model).merge_and_unload())
    before, base = named_weights(start), named_weights(tiny_model(seed=1))
    for name, tensor in named_weights(reference).items():
        torch.testing.assert_close(tensor, 0.6 * merged[name] + 0.4 * before[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    for name, policy in named_weights(run.model).items():
        frozen = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if frozen in base and not policy.requires_grad:
            assert torch.equal(policy, base[frozen]), "merging is done in a copy"


def test_bema_gives_a_given_reference_the_averaged_adapter_merged(tmp_path: Path) -> None:
    """kappa = eta = 0: the average is theta + (theta - theta_0), which the policy itself is not."""
    bema = BEMACallback(1, ema_power=0.0, bias_power=0.0, update_ref_model=True, ref_model_update_freq=1)
    reference = tiny_model(seed=1)
    run = trainer(tmp_path, ref_model=reference, peft_config=copy.deepcopy(LORA), callbacks=[bema], max_steps=2)
    run.train()
    merged = named_weights(copy.deepcopy(bema.running_model).merge_and_unload())
    for name, tensor in named_weights(reference).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], tensor_of(run.model, "q_proj"))


def tensor_of(model: Any, layer: str) -> torch.Tensor:
    return model.base_model.model.model.layers[0].self_attn.get_submodule(layer).base_layer.weight


def other_rank() -> Any:
    return get_peft_model(tiny_model(seed=1), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


REFUSED = {
    "another rank": ({"ref_model": other_rank, "peft_config": LORA}, "of shape"),
    "adapters that the policy lacks": ({"ref_model": other_rank}, "none of that name"),
    "another model": ({"ref_model": lambda: tiny_model(intermediate_size=32)}, "of shape"),
    "another name": (
        {"ref_model": lambda: get_peft_model(tiny_model(seed=1), LORA, "other"), "peft_config": LORA},
        "between two adapters of different forms",
    ),
    "a prompt": (
        {
            "ref_model": lambda: tiny_model(seed=1),
            "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        },
        "no change of a weight",
    ),
    "a tied head": (
        {
            "model": lambda: tiny_model(seed=1, tie_word_embeddings=True),
            "ref_model": lambda: tiny_model(seed=1, tie_word_embeddings=True),
            "peft_config": LoraConfig(r=2, target_modules=["lm_head"]),
        },
        "tied to the embeddings",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("by", ["TR-DPO", "BEMA"])
def test_what_cannot_follow_is_refused_before_the_first_step(kind: str, by: str, tmp_path: Path) -> None:
    options, message = REFUSED[kind]
    options = {name: value() if callable(value) else copy.deepcopy(value) for name, value in options.items()}
    if by == "BEMA":
        options |= {"sync_ref_model": False, "callbacks": [BEMACallback(update_ref_model=True)]}
    diary = Diary()
    with pytest.raises(ValueError, match=message):
        diary.run, _ = moving(tmp_path, **options)
    assert not diary.policy


def beforehand(rows: Dataset) -> Dataset:
    columns = {"ref_chosen_logps": [-1.0] * len(rows), "ref_rejected_logps": [-1.0] * len(rows)}
    return Dataset.from_dict({**rows.to_dict(), **columns})


@pytest.mark.parametrize("by", ["TR-DPO", "BEMA"])
@pytest.mark.parametrize("kind", ["train", "eval", "precompute", "evaluate"])
def test_a_reference_that_moves_has_no_log_probs_beforehand(kind: str, by: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train": {"rows": beforehand(dataset(8))},
        "eval": {"eval_dataset": {"a": dataset(4), "b": beforehand(dataset(4))}},
        "precompute": {"precompute_ref_log_probs": True},
        "evaluate": {},
    }[kind]
    options |= TR_DPO if by == "TR-DPO" else {"callbacks": [BEMACallback(update_ref_model=True)]}

    def attempt() -> None:
        run = trainer(tmp_path, max_steps=1, **options)
        run.train()
        run.evaluate(beforehand(dataset(4)))

    with pytest.raises(ValueError, match=r"left behind|scored beforehand|would leave the reference"):
        attempt()


def test_bema_that_comes_later_needs_a_reference_of_its_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=copy.deepcopy(LORA))
    run.add_callback(BEMACallback(update_ref_model=True))
    with pytest.raises(ValueError, match="to the trainer's constructor, in `callbacks`"):
        run.train()
    for method in ("cpo", "tpo"):
        with pytest.raises(ValueError, match="no reference that can be updated"):
            trainer(tmp_path, method, callbacks=[BEMACallback(update_ref_model=True)]).train()


# -- checkpoints ---------------------------------------------------------------------------------------------------


BEMA_OPTIONS: dict[str, Any] = {"update_freq": 1, "update_after": 1, "bias_power": 0.5}
RESUMED = {
    "BEMA": (BEMA_OPTIONS, {}),
    "BEMA for the reference": ({**BEMA_OPTIONS, "update_ref_model": True, "ref_model_update_freq": 2}, {}),
    "BEMA for the reference, LoRA": (
        {**BEMA_OPTIONS, "update_ref_model": True, "ref_model_update_freq": 2},
        {"peft_config": LORA},
    ),
    "a given reference, LoRA": (
        {**BEMA_OPTIONS, "update_ref_model": True, "ref_model_update_freq": 2},
        {"peft_config": LORA, "given": True},
    ),
    "TR-DPO, given reference, LoRA": (BEMA_OPTIONS, {"peft_config": LORA, "given": True, **TR_DPO}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_average_and_the_reference(name: str, tmp_path: Path) -> None:
    """Weights, log, reference and both averages after a resume are those of the run that was not interrupted."""

    def made(folder: str) -> tuple[Any, list[BEMACallback]]:
        torch.manual_seed(3)
        bema, options = RESUMED[name]
        options = {"save_strategy": "steps", "save_steps": 2, **copy.deepcopy(options)}
        if options.pop("given", False):
            options["ref_model"] = tiny_model(seed=1)
        averages = [BEMACallback(**bema), BEMACallback(2, ema_power=0.2)]
        return trainer(tmp_path / folder, callbacks=averages, max_steps=5, **options), averages

    (whole, averages), (resumed, later) = made("whole"), made("resumed")
    whole.train()
    for number in range(2):
        assert (tmp_path / "whole" / "checkpoint-2" / f"bema_{number}.safetensors").is_file()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_rows(resumed) == log_rows(whole)
    for one, other in zip(averages, later, strict=True):
        for key, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
    if whole.moving_reference is not None:
        for key, tensor in whole.moving_reference.weights().items():
            assert torch.equal(tensor, resumed.moving_reference.weights()[key]), key
    else:
        assert not averages[0].update_ref_model


def test_a_checkpoint_without_an_average_begins_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    bema = BEMACallback(1)
    run = trainer(tmp_path, max_steps=2, callbacks=[bema])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "BEMA's average begins with this run" in caplog.text
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    assert torch.equal(weights(saved), weights(bema.running_model))


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_best_model_is_compared_with_its_own_reference(kind: str, tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=dataset(9, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=kind == "full",
        **TR_DPO,
        **copy.deepcopy(KINDS[kind]),
    )
    run.train()
    found = [row["eval_rewards/margins"] for row in run.state.log_history if "eval_rewards/margins" in row]
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(run.state.best_metric, **SAME_REWARDS)
    assert abs(run.state.best_metric - found[-1]) > 1e-3, "the last reference would give another margin"


# -- log-probs that come with an evaluation set --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["constructor", "evaluate"])
def test_given_log_probs_of_an_evaluation_set_are_used(where: str, tmp_path: Path) -> None:
    rows = standard_rows(4, seed=7)
    given = Dataset.from_dict({**rows, "ref_chosen_logps": [-50.0] * 4, "ref_rejected_logps": [-40.0] * 4})
    run = trainer(tmp_path, eval_dataset=given if where == "constructor" else dataset(4), max_steps=1)
    metrics = run.evaluate(None if where == "constructor" else given)
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.1 * (metrics["eval_logps/chosen"] + 50), rel=1e-4)
    run.train()
    assert run.state.log_history[-2]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    plain = run.evaluate(Dataset.from_dict(rows))
    assert abs(plain["eval_rewards/chosen"]) < 1, "rows without columns are compared with the reference"


@pytest.mark.parametrize("method", ["cpo", "tpo"])
@pytest.mark.parametrize("name", ["precompute_ref_log_probs", "sync_ref_model"])
def test_methods_without_a_reference_say_why_they_lack_an_option(method: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"argument '{name}': {method.upper()} compares with no reference"):
        trainer(tmp_path, method, **{name: True})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
        trainer(tmp_path, method, nonsense=1)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_methods_without_a_reference_say_that_the_columns_are_not_used(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, method, rows=beforehand(dataset(8)), max_steps=1).train()
    assert f"{method.upper()} has no reference: the columns `ref_*_logps` are not used." in caplog.text
