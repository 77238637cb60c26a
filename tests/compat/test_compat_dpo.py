"""What users of TRL's DPO tests touch: constructor, containers, parameters that move, the log, tags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from parameters import CONTAINERS, ROWS, check_losses, check_prepared, pairs, snapshot, train_and_compare, unmoved
from tiny_models import FAMILIES, conversational_rows, implicit, standard_rows, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM

from prefopt import DPOConfig, DPOTrainer

LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
LOSSES += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


def config(out: str, **options: Any) -> DPOConfig:
    """The defaults (three epochs, one log at the end, checkpointing on) with a rate at which weights move."""
    return DPOConfig(out, **{"learning_rate": 0.1, "report_to": "none", "disable_tqdm": True, **options})


# -- constructor ----------------------------------------------------------------------------------------------------


def test_a_training_set_is_required(model: str, out: str) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DPOTrainer(model, args=config(out))


@pytest.mark.parametrize("container", ["DatasetDict", "dict of Dataset"])
def test_a_training_set_is_one_set(container: str, model: str, out: str) -> None:
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset` or `IterableDataset`"):
        DPOTrainer(model, args=config(out), train_dataset=CONTAINERS[container](pairs()))


def test_what_is_no_tokenizer(model: str, out: str) -> None:
    with pytest.raises(TypeError, match="must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`"):
        DPOTrainer(model, args=config(out), train_dataset=pairs(), processing_class="tokenizer")


def test_what_is_no_adapter(model: str, out: str) -> None:
    with pytest.raises(TypeError, match=r"`peft_config` must be a `peft.PeftConfig`"):
        DPOTrainer(model, args=config(out), train_dataset=pairs(), peft_config={"r": 4})


def test_images_need_a_model_that_sees(model: str, out: str) -> None:
    rows = conversational_rows(4) | {"images": [["photo.jpg"]] * 4}
    with pytest.raises(ValueError, match=r"(?is)vision-related.*vision-language model"):
        DPOTrainer(model, args=config(out), train_dataset=Dataset.from_dict(rows))


def test_experts_weight_needs_experts(model: str, out: str) -> None:
    with pytest.raises(ValueError, match=r"not a Mixture-of-Experts model"):
        DPOTrainer(model, args=config(out, router_aux_loss_coef=0.1), train_dataset=pairs())


def test_an_unknown_pad_token(model: str, out: str) -> None:
    with pytest.raises(ValueError, match="not found in the vocabulary"):
        DPOTrainer(model, args=config(out, pad_token="<nothing>"), train_dataset=pairs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "exo_pair"}, r"(?i)label.smoothing"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"loss_weights"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, r"f_divergence_type"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, r"sync_ref_model.*precompute_ref_log_probs"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str, out: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(out, **options)


def test_options_of_loading_do_nothing_to_a_loaded_model(out: str) -> None:
    args = config(out, model_init_kwargs={"dtype": "float16"})
    trainer = DPOTrainer(tiny_model(), args=args, train_dataset=pairs(), processing_class=word_tokenizer())
    assert trainer.model.dtype == torch.float32


def test_options_stay_changeable(out: str) -> None:
    args = config(out)
    args.beta = 0.3
    trainer = DPOTrainer(tiny_model(), args=args, train_dataset=pairs(), processing_class=word_tokenizer())
    assert trainer.args.beta == 0.3


def test_a_loss_name_becomes_a_list(out: str) -> None:
    assert config(out, loss_type="ipo").loss_type == ["ipo"]
    assert config(out).loss_type == ["sigmoid"]


def test_no_pad_token_becomes_the_eos_token(model: str, out: str) -> None:
    trainer = DPOTrainer(model, args=config(out), train_dataset=pairs())
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token


# -- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_the_training_set_is_tokenised(streaming: bool, model: str, out: str) -> None:
    data = pairs().to_iterable_dataset() if streaming else pairs()
    trainer = DPOTrainer(model, args=config(out, max_steps=3 if streaming else -1), train_dataset=data)
    row = next(iter(trainer.train_dataset))
    tokenizer = trainer.processing_class
    rows = standard_rows(ROWS)
    assert row["prompt_ids"] == tokenizer(rows["prompt"][0])["input_ids"]
    for side in ("chosen", "rejected"):
        completion = tokenizer(rows[side][0] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        assert row[f"{side}_ids"] == completion


@pytest.mark.parametrize("container", [*CONTAINERS, None])
def test_evaluation_sets_at_construction(container: str | None, model: str, out: str) -> None:
    data = CONTAINERS[container](pairs(4)) if container else None
    trainer = DPOTrainer(model, args=config(out), train_dataset=pairs(), eval_dataset=data)
    if data is None:
        assert trainer.eval_dataset is None
    else:
        check_prepared(trainer.eval_dataset)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_evaluation_of_raw_sets(container: str, precompute: bool, model: str, out: str) -> None:
    trainer = DPOTrainer(model, args=config(out, precompute_ref_log_probs=precompute), train_dataset=pairs())
    check_losses(trainer.evaluate(eval_dataset=CONTAINERS[container](pairs(5))), container)


@pytest.mark.parametrize("container", ["Dataset", "DatasetDict", "dict of Dataset"])
def test_evaluation_after_training_with_precomputed_references(container: str, model: str, out: str) -> None:
    args = config(out, max_steps=1, precompute_ref_log_probs=True)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), eval_dataset=CONTAINERS[container](pairs(4)))
    trainer.train()
    check_losses(trainer.evaluate(), container)


def test_a_prompt_that_fills_the_budget_is_left_out(model: str, out: str) -> None:
    rows = {"prompt": ["gaga", "gaga " * 12], "chosen": [" baba", " baba"], "rejected": [" dada", " dada"]}
    trainer = DPOTrainer(model, args=config(out, max_length=6), train_dataset=Dataset.from_dict(rows))
    assert len(trainer.train_dataset) == 1
    assert trainer.train_dataset[0]["prompt_ids"] == trainer.processing_class("gaga")["input_ids"]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_formats_train(conversational: bool, explicit: bool, model: str, out: str) -> None:
    rows = conversational_rows(ROWS) if conversational else standard_rows(ROWS)
    data = Dataset.from_dict(rows if explicit else implicit(rows))
    assert not train_and_compare(DPOTrainer(model, args=config(out), train_dataset=data))


def test_template_arguments_of_a_row(model: str, out: str) -> None:
    """A column ``chat_template_kwargs``; the tokenizer that was given is used and kept as it is."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if loud %}system {% endif %}" + tokenizer.chat_template
    rows = conversational_rows(4) | {"chat_template_kwargs": [{"loud": bool(i % 2)} for i in range(4)]}
    data = Dataset.from_dict(rows)
    trainer = DPOTrainer(model, args=config(out), train_dataset=data, processing_class=tokenizer)
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    system = tokenizer.convert_tokens_to_ids("system")
    assert [system in trainer.train_dataset[i]["prompt_ids"] for i in range(4)] == [False, True, False, True]


def test_a_stream_trains(model: str, out: str) -> None:
    trainer = DPOTrainer(model, args=config(out, max_steps=3), train_dataset=pairs().to_iterable_dataset())
    assert not train_and_compare(trainer)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_moves(family: str, model_folder: dict[str, str], out: str) -> None:
    """Embeddings, norms, biases, heads, routers, experts, convolutions: all of them, on the default layout."""
    folder = model_folder[family]
    trainer = DPOTrainer(folder, args=config(out), train_dataset=pairs(), processing_class=word_tokenizer())
    assert not train_and_compare(trainer)
    assert trainer.aux_loss_enabled == (family in {"qwen3_moe", "gpt_oss"})
    assert ("aux_loss" in trainer.state.log_history[-1]) == trainer.aux_loss_enabled


def test_a_loaded_model_moves(model: str, out: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    trainer = DPOTrainer(model=loaded, args=config(out), train_dataset=pairs())
    assert trainer.model is loaded
    assert not train_and_compare(trainer)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_and_evaluates(loss_type: str, model: str, out: str) -> None:
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
    args = config(out, loss_type=loss_type, label_smoothing=smoothing, eval_strategy="steps", eval_steps=3)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), eval_dataset=pairs(3, seed=1))
    assert not train_and_compare(trainer)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "reverse_kl"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"gradient_checkpointing": False},
    ],
    ids=lambda options: "-".join(map(str, *options.items())) if isinstance(options, dict) else None,
)
def test_options_train(options: dict[str, Any], model: str, out: str) -> None:
    assert not train_and_compare(DPOTrainer(model, args=config(out, **options), train_dataset=pairs()))


def test_a_given_reference_stays(model: str, out: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    trainer = DPOTrainer(model, ref_model=reference, args=config(out), train_dataset=pairs())
    before = snapshot(trainer.model)
    assert not train_and_compare(trainer)
    assert unmoved(trainer.ref_model, before) == set(before)


def test_a_synchronised_reference_moves(model: str, out: str) -> None:
    args = config(out, sync_ref_model=True, ref_model_sync_steps=2)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs())
    before = snapshot(trainer.ref_model)
    assert not train_and_compare(trainer)
    assert set(before) == set(snapshot(trainer.model))
    assert not unmoved(trainer.ref_model, before)


def test_weights_of_half_precision(model: str, out: str) -> None:
    """``dtype`` as a ``torch.dtype``; the weights stay in it and the run ends."""
    args = config(out, model_init_kwargs={"dtype": torch.float16})
    trainer = DPOTrainer(model, args=args, train_dataset=pairs())
    still = train_and_compare(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float16}
    assert all("norm" in name for name in still)


# -- adapters -------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> Any:
    return pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM", **options)


def check_adapter_alone_moved(still: set[str], trainer: Any) -> None:
    """The weights of the model stay, those of the adapter move; a frozen copy is called ``ref...``."""
    names = set(snapshot(trainer.model))
    trained = {name for name in names if "lora" in name and "ref" not in name}
    assert trained
    assert still == names - trained


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_new_adapter(checkpointing: bool, model: str, out: str) -> None:
    args = config(out, learning_rate=1.0, gradient_checkpointing=checkpointing)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), peft_config=lora())
    check_adapter_alone_moved(train_and_compare(trainer), trainer)
    assert trainer.ref_model is None


def test_a_model_with_an_adapter(out: str) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), lora(target_modules=["q_proj", "v_proj"]))
    args = config(out, learning_rate=1.0)
    trainer = DPOTrainer(wrapped, args=args, train_dataset=pairs(), processing_class=word_tokenizer())
    check_adapter_alone_moved(train_and_compare(trainer), trainer)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_on_expert_weights(wrapped: bool, model_folder: dict[str, str], out: str) -> None:
    """peft adapts fused expert weights by parameter, not by module; an identity at the start needs no copy."""
    peft = pytest.importorskip("peft")
    adapter = lora(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    if wrapped:
        base = AutoModelForCausalLM.from_pretrained(model_folder["gpt_oss"], dtype="float32")
        trainer = DPOTrainer(peft.get_peft_model(base, adapter), args=config(out), train_dataset=pairs())
        assert "ref" not in trainer.model.peft_config
    else:
        trainer = DPOTrainer(model_folder["gpt_oss"], args=config(out), train_dataset=pairs(), peft_config=adapter)
    check_adapter_alone_moved(train_and_compare(trainer), trainer)


# -- the log, metrics, tags -----------------------------------------------------------------------------------------


def test_the_summary_holds_the_metrics_of_the_open_window(model: str, out: str) -> None:
    """Nine steps and a log every ten: the only row of the log is the summary."""
    trainer = DPOTrainer(model, args=config(out), train_dataset=pairs())
    trainer.train()
    assert len(trainer.state.log_history) == 1
    assert {"train_loss", "rewards/margins", "mean_token_accuracy", "num_tokens"} <= set(trainer.state.log_history[0])


def test_keys_of_a_training_row(model: str, out: str) -> None:
    trainer = DPOTrainer(model, args=config(out, logging_steps=1, max_steps=1), train_dataset=pairs())
    trainer.train()
    sides = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    rest = {"loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "mean_token_accuracy", "epoch", "step"}
    assert sides | rest | {"rewards/accuracies", "rewards/margins"} <= set(trainer.state.log_history[0])


def test_evaluation_during_training_comes_first_in_the_log(model: str, out: str) -> None:
    args = config(out, eval_strategy="steps", eval_steps=3)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), eval_dataset=pairs(4))
    trainer.train()
    assert trainer.state.log_history[0]["eval_loss"] is not None
    assert trainer.state.log_history[0]["eval_rewards/margins"] is not None


def test_one_row_for_each_evaluation_set(model: str, out: str) -> None:
    args = config(out, eval_strategy="steps", eval_steps=3)
    sets = CONTAINERS["dict of Dataset"](pairs(4))
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), eval_dataset=sets)
    trainer.train()
    assert trainer.state.log_history[-3]["eval_one_loss"] is not None
    assert trainer.state.log_history[-2]["eval_two_loss"] is not None


def test_metrics_of_the_user(model: str, out: str) -> None:
    seen: list[Any] = []

    def count(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 0.25}

    args = config(out, eval_strategy="steps", eval_steps=3)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), eval_dataset=pairs(4), compute_metrics=count)
    trainer.train()
    assert trainer.state.log_history[-2]["eval_mine"] == 0.25
    assert len(seen) == 3


@pytest.mark.parametrize("adapter", [False, True])
def test_tags(adapter: bool, model: str, out: str) -> None:
    trainer = DPOTrainer(model, train_dataset=pairs(), peft_config=lora() if adapter else None)
    assert {"prefopt", "dpo"} <= set(trainer.model.model_tags)
