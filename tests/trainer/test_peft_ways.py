"""Adapters with ways of their own, and quantised models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import PLAIN_RUN, expected_losses, logged_losses
from peft_kinds import (
    HALF,
    KINDS,
    READ_BACK,
    assert_trains_as_defined,
    kind_of,
    log_probs,
    lora,
    shake,
    trained_names,
    tuner,
    with_adapter,
)
from short_runs import TRAINERS, dataset, trainer
from tiny_models import save_tiny, tiny_model
from transformers import BitsAndBytesConfig

from prefopt.batching import pad_batch
from prefopt.data import tokenized_example
from prefopt.types import PAIR


def test_biases_of_a_stacked_adapter_are_trained(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(seed=1, attention_bias=True), lora()())
    shake(model, "default")
    run = trainer(tmp_path, model=model, peft_config=lora(bias="all")(), **PLAIN_RUN)
    assert {name.split(".")[-1] for name in trained_names(run.model) if ".preference." not in name} == {"bias"}
    assert_trains_as_defined(run)


def test_a_merged_adapter_is_taken_out_to_be_trained(tmp_path: Path) -> None:
    model = with_adapter()
    model.merge_adapter()
    assert_trains_as_defined(trainer(tmp_path, model=model, **PLAIN_RUN))


def test_llama_adapters_and_adapters_of_two_kinds(tmp_path: Path) -> None:
    """Wrappers that keep the forward they found, and one that does not say what is inside."""
    kind = kind_of("AdaptionPromptConfig", adapter_len=3, adapter_layers=1)
    assert_trains_as_defined(trainer(tmp_path, model=tiny_model(seed=1), peft_config=kind(), **PLAIN_RUN))
    model = peft.PeftMixedModel(tiny_model(seed=1), lora()())
    model.add_adapter("other", tuner("LoHaConfig", r=2)())
    model.set_adapter(["default", "other"])
    run = trainer(tmp_path, model=model, **PLAIN_RUN)
    assert run.layout.layout == "shared_prompt"
    assert_trains_as_defined(run)


def test_full_logits_are_of_the_tokens_that_are_there(tmp_path: Path) -> None:
    """Not of the virtual ones in front."""
    seen: list[Any] = []
    run = trainer(
        tmp_path,
        model=tiny_model(seed=1),
        peft_config=KINDS["prompt tuning"].config(),
        eval_dataset=dataset(2),
        full_logits_for_metrics=True,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
        **PLAIN_RUN,
    )
    run.evaluate()
    batch = pad_batch([tokenized_example(row, PAIR) for row in run.eval_dataset], PAIR)
    assert [logits.shape[1] for logits in seen[0].logits] == 2 * [batch.model_inputs["input_ids"].shape[1]]
    logps = torch.tensor(seen[0].logits[0][0]).log_softmax(-1)
    mine = slice(batch.layout.lengths[0])
    chosen = logps[batch.predict_from[mine], batch.targets[mine]].sum().item()
    assert seen[0].logps_chosen[0] == pytest.approx(chosen, rel=1e-5)


def test_adalora_is_regularised_and_given_its_budget(tmp_path: Path) -> None:
    """The regulariser is PEFT's own, which it adds where the model computes a loss; ranks are taken away."""
    config = tuner(
        "AdaLoraConfig", init_r=6, target_r=2, total_step=6, tinit=1, tfinal=2, deltaT=1, orth_reg_weight=0.3
    )
    run = trainer(tmp_path, model=tiny_model(seed=1), peft_config=config(), max_steps=6, per_device_train_batch_size=4)
    ids = torch.tensor([[5, 6, 7, 8]])
    bare = run.model.get_base_model()(input_ids=ids, labels=ids).loss
    regulariser = (run.model(input_ids=ids, labels=ids).loss - bare).item()
    run.train()
    assert regulariser > 0.1
    assert logged_losses(run)[0] == pytest.approx(math.log(2) + regulariser, rel=1e-5)
    kept = sum(int((values != 0).sum()) for name, values in run.model.named_parameters() if "lora_E" in name)
    layers = sum("lora_E" in name for name, _ in run.model.named_parameters())
    assert kept == 2 * layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_model_are_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """As PEFT casts them; the reference agrees with the policy at the start and is saved in nothing."""
    run = trainer(tmp_path, model=tiny_model(seed=1).to(dtype), peft_config=lora()(), **PLAIN_RUN)
    trained = {name: p.dtype for name, p in run.model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    expected = expected_losses(run)
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=HALF)


# -- quantised models --------------------------------------------------------------------------------------------------


@pytest.fixture
def quantised(tmp_path: Path) -> Callable[..., Any]:
    """A trainer of LoRA on a model in 4 or 8 bits, by bitsandbytes' own code for the CPU."""
    pytest.importorskip("bitsandbytes")
    path = save_tiny(tmp_path / "model", seed=1, hidden_size=64, intermediate_size=128, head_dim=16)

    def made(method: str, **bits: Any) -> Any:
        make, config = TRAINERS[method]
        options = {name: value for name, value in PLAIN_RUN.items() if name != "count"}
        args = config(str(tmp_path), **options, logging_steps=1, eval_strategy="steps", eval_steps=1, report_to="none")
        quantization = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        data = {"train_dataset": dataset(4), "eval_dataset": dataset(2, seed=4)}
        return make(path, args=args, **data, quantization_config=quantization, peft_config=lora()())

    return made


@pytest.mark.usefixtures("reference_cache")
@pytest.mark.parametrize("method", TRAINERS)
def test_qlora(method: str, quantised: Callable[..., Any]) -> None:
    """Evaluated between the steps: a pass in evaluation mode must not cost the layers their gradient."""
    run = quantised(method, load_in_4bit=True)
    base = run.model.get_base_model()
    assert type(base.model.layers[0].self_attn.k_proj).__name__ == "Linear4bit"
    assert type(base.lm_head) is torch.nn.Linear
    assert base.lm_head.weight.dtype == torch.float32
    assert run.layout.layout == "shared_prompt"
    assert_trains_as_defined(run)
    trained = log_probs(run.model)
    run.save_model()
    loaded = quantised("cpo", load_in_4bit=True).model.unload()
    loaded = peft.PeftModel.from_pretrained(loaded, run.args.output_dir)
    assert torch.allclose(log_probs(loaded), trained, atol=READ_BACK * trained.abs().max().item())


def test_eight_bits(quantised: Callable[..., Any]) -> None:
    """The reference rounds as the policy does, so the margin begins at 0."""
    run = quantised("dpo", load_in_8bit=True)
    run.train()
    assert logged_losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logged_losses(run)[1] - math.log(2)) > 1e-3
