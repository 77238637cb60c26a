"""Adapters of every kind in the trainers: the reference, the layout, two steps by the definition, saved and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import PLAIN_RUN, SAME_LOSS, expected_losses, logged_losses, plain_stats
from runs import TRAINERS, dataset, trainer, weights
from tiny_models import save_tiny, tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from prefopt import DPOTrainer
from prefopt.batching import pad_batch
from prefopt.data import tokenized_example
from prefopt.reference.policy import AdapterOff, NamedAdapter, SeparateModel, StartingWeights
from prefopt.scoring.forward import uses_full_logits
from prefopt.types import PAIR

READ_BACK = 1e-5
"""Nats, float32: a weight that was saved is the same, a product of factors that was merged is rounded otherwise."""
HALF = 1e-2
"""Relative: losses of log-probs whose logits are rounded to 8 bits, in layouts that round otherwise."""
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def kind_of(name: str, **options: Any) -> Callable[[], Any]:
    """A maker of configs; PEFT changes the config that it is given."""
    return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **options)


def lora(**options: Any) -> Callable[[], Any]:
    return kind_of("LoraConfig", **{"r": 4, "target_modules": TARGETS, **options})


def tuner(name: str, **options: Any) -> Callable[[], Any]:
    return kind_of(name, **{"target_modules": TARGETS, **options})


@dataclass(frozen=True)
class Kind:
    """An adapter, the model it is put on, and what it should get."""

    config: Callable[[], Any]
    reference: type = StartingWeights
    layout: str = "shared_prompt"
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)

    def made(self) -> Any:
        return tiny_model(self.family, seed=1, **self.model)


TIED = {"tie_word_embeddings": True}
KINDS: dict[str, Kind] = {
    "LoRA": Kind(lora(), AdapterOff),
    "rsLoRA": Kind(lora(use_rslora=True), AdapterOff),
    "DoRA": Kind(lora(use_dora=True)),
    "PiSSA": Kind(lora(init_lora_weights="pissa")),
    "OLoRA": Kind(lora(init_lora_weights="olora")),
    "EVA without data": Kind(lora(init_lora_weights="eva"), AdapterOff),
    "orthogonal": Kind(lora(init_lora_weights="orthogonal")),
    "LoRA with bias": Kind(lora(lora_bias=True), AdapterOff),
    "all biases": Kind(lora(bias="all"), model={"attention_bias": True}),
    "head": Kind(lora(target_modules=["q_proj", "lm_head"]), AdapterOff),
    "tied head": Kind(lora(target_modules=["q_proj", "lm_head"]), AdapterOff, model=TIED),
    "embeddings": Kind(lora(target_modules=["embed_tokens", "q_proj"]), AdapterOff),
    "saved head": Kind(lora(modules_to_save=["lm_head"]), AdapterOff),
    "saved tied head": Kind(lora(modules_to_save=["lm_head"]), AdapterOff, model=TIED),
    "saved head and embeddings": Kind(lora(modules_to_save=["lm_head", "embed_tokens"]), AdapterOff),
    "trainable tokens beside LoRA": Kind(lora(trainable_token_indices=[5, 9, 20])),
    "trainable tokens": Kind(kind_of("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[5, 9])),
    "tied trainable tokens": Kind(lora(trainable_token_indices=[5, 9, 20]), model=TIED),
    "experts": Kind(lora(target_modules=[], target_parameters=EXPERTS), AdapterOff, family="qwen3_moe"),
    "experts and attention": Kind(lora(target_parameters=EXPERTS[:1]), AdapterOff, family="gpt_oss"),
    "LoHa": Kind(tuner("LoHaConfig", r=4)),
    "LoKr": Kind(tuner("LoKrConfig", r=4)),
    "AdaLoRA": Kind(
        tuner("AdaLoraConfig", total_step=100, tinit=10, tfinal=10, orth_reg_weight=1e-9, lora_alpha=1000), AdapterOff
    ),
    "IA3": Kind(tuner("IA3Config", feedforward_modules=["down_proj"]), AdapterOff),
    "VeRA": Kind(kind_of("VeraConfig", target_modules=["q_proj", "o_proj"], r=8)),
    "OFT": Kind(tuner("OFTConfig", oft_block_size=4)),
    "BOFT": Kind(tuner("BOFTConfig", boft_block_size=4)),
    "HRA": Kind(tuner("HRAConfig", r=4)),
    "MiSS": Kind(tuner("MissConfig", r=4)),
    "FourierFT": Kind(tuner("FourierFTConfig", n_frequency=20)),
    "RandLora": Kind(tuner("RandLoraConfig", r=4)),
    "SHiRA": Kind(tuner("ShiraConfig", r=4)),
    "layer norms": Kind(kind_of("LNTuningConfig", target_modules=["input_layernorm", "norm"])),
    "prompt tuning": Kind(kind_of("PromptTuningConfig", num_virtual_tokens=3), layout="padded"),
    "p-tuning": Kind(kind_of("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16), layout="padded"),
    "prefix tuning": Kind(kind_of("PrefixTuningConfig", num_virtual_tokens=3), layout="padded"),
    "projected prefix": Kind(
        kind_of("PrefixTuningConfig", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16),
        layout="padded",
    ),
    "CPT": Kind(
        kind_of("CPTConfig", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
        layout="padded",
    ),
    "VB-LoRA": Kind(tuner("VBLoRAConfig", num_vectors=8, vector_length=16, init_vector_bank_bound=2.0)),
    "activated LoRA": Kind(lora(alora_invocation_tokens=[9]), layout="padded"),
}
UNMERGED = (
    *("prompt tuning", "p-tuning", "prefix tuning", "projected prefix", "CPT"),  # no weights of layers
    *("activated LoRA", "LoRA with bias"),
    "tied head",  # the embeddings would get what is added to the head
)
"""Kinds that PEFT does not merge, or not rightly."""
LAYOUTS = ("packed", "padded")
IN_EVERY_LAYOUT = ("DoRA", "tied head", "saved head", "tied trainable tokens", "experts")
IN_EVERY_TRAINER = ("LoRA", "tied head", "experts", "prefix tuning", "p-tuning")


def run_of(folder: Path, kind: Kind, method: str = "dpo", **options: Any) -> Any:
    return trainer(folder, method, model=kind.made(), peft_config=kind.config(), **{**PLAIN_RUN, **options})


def assert_trains_as_defined(run: Any) -> None:
    expected = expected_losses(run)
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
    assert abs(expected[1] - expected[0]) > 10 * SAME_LOSS * expected[0], "the first step did not show"


@cache
def prepared_rows() -> list[dict[str, Any]]:
    """The rows of a plain run, as token ids."""
    return list(trainer(Path("unused"), count=PLAIN_RUN["count"]).train_dataset)


@torch.no_grad()
def log_probs(model: Any, count: int = PLAIN_RUN["count"]) -> torch.Tensor:
    """[2, count] log p of chosen and rejected of the first rows, from full logits."""
    batch = pad_batch([tokenized_example(row, PAIR) for row in prepared_rows()[:count]], PAIR)
    stats, _ = plain_stats(model.eval(), batch)
    return torch.stack([stats[branch].sum_logps for branch in PAIR])


# -- two steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("reference_cache")  # so that the reference has a fingerprint
@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, tmp_path: Path) -> None:
    """DPO: the reference is what the policy starts from, so the margin begins at 0; nothing needs the full logits.

    What was saved, put on the model it began from, gives the same log-probs; so do merged weights.
    """
    kind = KINDS[name]
    run = run_of(tmp_path, kind)
    assert run.layout.layout == kind.layout
    assert not uses_full_logits(run.model)
    assert type(run.model_reference) is kind.reference
    assert_trains_as_defined(run)
    assert run.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)

    run.save_model(str(tmp_path / "saved"))
    trained = log_probs(run.model)
    loaded = peft.PeftModel.from_pretrained(kind.made(), str(tmp_path / "saved"))
    assert (log_probs(loaded) - trained).abs().max() < READ_BACK * trained.abs().max()
    if name not in UNMERGED:
        assert (log_probs(loaded.merge_and_unload()) - trained).abs().max() < READ_BACK * trained.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_EVERY_LAYOUT)
def test_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, KINDS[name], layout=layout)
    assert run.layout.layout == layout
    assert_trains_as_defined(run)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
@pytest.mark.parametrize("name", IN_EVERY_TRAINER)
def test_every_trainer(name: str, method: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, KINDS[name], method)
    assert run.layout.layout == KINDS[name].layout
    assert_trains_as_defined(run)


# -- saved, read back, resumed -----------------------------------------------------------------------------------------


RESUMED = ("PiSSA", "saved head", "AdaLoRA", "prompt tuning", "p-tuning", "projected prefix", "experts")


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_changes_nothing(name: str, tmp_path: Path) -> None:
    """Also of p-tuning, of which PEFT saves the virtual tokens and not what makes them."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    whole = run_of(tmp_path / "whole", KINDS[name], **options)
    whole.train()
    resumed = run_of(tmp_path / "resumed", KINDS[name], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert logged_losses(resumed) == logged_losses(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def with_adapter(name: str = "default", *, acts: bool = True, **options: Any) -> Any:
    """A PeftModel whose adapter was trained before."""
    model = peft.get_peft_model(tiny_model(seed=1), lora(**options)(), adapter_name=name)
    if acts:
        shake(model, name)
    return model


def shake(model: Any, adapter: str) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def several() -> Any:
    """Three adapters; the third is active."""
    model = with_adapter("first")
    for name in ("second", "third"):
        model.add_adapter(name, lora(r=2)())
        shake(model, name)
    model.set_adapter("third")
    return model


GIVEN: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "another name": (lambda: {"model": with_adapter("mine")}, {}),
    "several": (lambda: {"model": several()}, {}),
    "one of several": (lambda: {"model": several()}, {"model_adapter_name": "first"}),
    "stacked": (lambda: {"model": with_adapter(), "peft_config": lora(target_modules=["v_proj"])()}, {}),
    "stacked on another name": (lambda: {"model": with_adapter("mine"), "peft_config": lora(r=2)()}, {}),
}
"""PeftModels as users bring them: arguments of the trainer, and options of the config."""


@pytest.mark.parametrize("case", GIVEN)
def test_a_given_adapter_trains_and_resumes(case: str, tmp_path: Path) -> None:
    """Resumed, the adapters that were active are active and those that were trained are trained."""
    arguments, options = GIVEN[case]
    assert_trains_as_defined(trainer(tmp_path, **arguments(), **PLAIN_RUN, **options))
    options = {**PLAIN_RUN, **options, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "whole", **arguments(), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **arguments(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert logged_losses(resumed) == logged_losses(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.model.active_adapters == whole.model.active_adapters
    assert trained_names(resumed.model) == trained_names(whole.model)


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", ["another name", "stacked"])
def test_the_best_checkpoint_is_read_back(case: str, tmp_path: Path) -> None:
    """The first one; transformers would look for an adapter called ``default``, or read the first of several."""
    scores, seen = iter((2.0, 1.0)), AfterSteps()
    options = {**PLAIN_RUN, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tmp_path,
        **GIVEN[case][0](),
        **options,
        eval_dataset=dataset(4, seed=6),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[seen],
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert not torch.equal(seen.weights[1], seen.weights[0])
    assert torch.equal(weights(run.model), seen.weights[0])


class AfterSteps(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights(kwargs["model"]))


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A base model with its tokenizer, and a trained adapter of it without one."""
    base = save_tiny(tmp_path / "base", seed=1)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), lora()())
    shake(adapted, "default")
    adapted.save_pretrained(tmp_path / "adapter")
    return base, str(tmp_path / "adapter")


@pytest.mark.parametrize("method", TRAINERS)
def test_the_name_of_an_adapter(method: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """Its base model is loaded, it is trained further, and the reference has it in force."""
    make, config = TRAINERS[method]
    options = {name: value for name, value in PLAIN_RUN.items() if name != "count"}
    args = config(str(tmp_path), **options, logging_steps=1, report_to="none", save_strategy="no")
    run = make(folders[1], args=args, train_dataset=dataset(4))
    assert isinstance(run.model, peft.PeftModel)
    assert all("lora" in name for name in trained_names(run.model))
    assert run.processing_class.eos_token == word_tokenizer().eos_token
    assert run.prepare_options.max_length == 256  # the context of the base model
    assert_trains_as_defined(run)


def test_an_adapter_on_the_name_of_an_adapter_and_one_as_reference(folders: tuple[str, str], tmp_path: Path) -> None:
    run = trainer(tmp_path, model=folders[1], peft_config=lora(target_modules=["v_proj"])(), **PLAIN_RUN)
    assert run.model.active_adapters == ["default", "preference"]
    assert_trains_as_defined(run)
    args = trainer(tmp_path, **PLAIN_RUN).args
    run = DPOTrainer(folders[0], folders[1], args, train_dataset=dataset(4))
    assert isinstance(run.ref_model, peft.PeftModel)
    run.train()
    expected = log_probs(peft.PeftModel.from_pretrained(tiny_model(seed=1), folders[1]))
    assert torch.allclose(log_probs(run.ref_model), expected)


def test_an_adapter_that_names_no_base_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    file = Path(folders[1], "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"does not name its base model.*PeftModel.from_pretrained"):
        trainer(tmp_path, model=folders[1])


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_model_under_the_adapters_is_not_another_model(tmp_path: Path) -> None:
    """``ref_model=base`` after an adapter was put on ``base``: freezing it would freeze the adapter."""
    base = tiny_model(seed=1)
    args = trainer(tmp_path, **PLAIN_RUN).args
    run = DPOTrainer(
        base, base, args, train_dataset=dataset(4), processing_class=word_tokenizer(), peft_config=lora()()
    )
    assert isinstance(run.model_reference, AdapterOff)
    assert_trains_as_defined(run)


def test_a_named_adapter_is_the_reference(tmp_path: Path) -> None:
    options = {"model_adapter_name": "second", "ref_adapter_name": "first"}
    model = several()
    model.set_adapter("first")
    expected = log_probs(model, 2)
    run = trainer(tmp_path, model=model, **PLAIN_RUN, **options)
    assert isinstance(run.model_reference, NamedAdapter)
    own = log_probs(run.model, 2)
    run.train()
    reward = 0.1 * (own - expected)[0].mean().item()
    assert run.state.log_history[0]["rewards/chosen"] == pytest.approx(reward, rel=1e-3)
    assert all(".second." in name for name in trained_names(run.model))


def test_force_use_ref_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=with_adapter(), force_use_ref_model=True, **PLAIN_RUN)
    assert isinstance(run.model_reference, SeparateModel)
    assert_trains_as_defined(run)


# -- what does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, False])
def test_a_prefix_is_not_recomputed(chosen: bool | None, tmp_path: Path) -> None:
    """Layers that compute twice drop the cache that the prefix is: left open, checkpointing stays off."""
    options = {} if chosen is None else {"gradient_checkpointing": chosen}
    kind = KINDS["prefix tuning"]
    run = trainer(tmp_path, model=kind.made(), peft_config=kind.config(), **{**PLAIN_RUN, **options})
    assert_trains_as_defined(run)


def test_a_prefix_with_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True: the adapter 'default' is a cache"):
        run_of(tmp_path, KINDS["prefix tuning"], gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            lambda: with_adapter(),
            tuner("IA3Config", feedforward_modules=["down_proj"]),
            "of type IA3 cannot act together",
        ),
        (lambda: with_adapter(modules_to_save=["lm_head"]), lora(modules_to_save=["lm_head"]), "only one of the two"),
    ],
    ids=["another kind", "one module twice"],
)
def test_adapters_that_cannot_be_stacked(model: Any, config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model(), peft_config=config())


def test_a_frozen_adapter_is_refused_with_the_way_to_train_it(tmp_path: Path) -> None:
    model = with_adapter()
    model.requires_grad_(False)
    run = trainer(tmp_path, model=model, eval_dataset=dataset(2), **PLAIN_RUN)
    assert run.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"No weight of the model is trainable.*is_trainable=True"):
        run.train()


def test_an_adapter_that_mixes_the_rows_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Lily, whose routers average over all tokens of a batch"):
        trainer(tmp_path, peft_config=tuner("LilyConfig")())


# -- kinds with ways of their own --------------------------------------------------------------------------------------


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
