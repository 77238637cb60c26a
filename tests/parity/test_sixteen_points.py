"""What TRL 1.16 refuses or gets wrong, point by point: each test shows TRL failing, and prefopt doing it.

Where another test of this folder shows a part of a point already, with the number worked out by a third way, it is
called from here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import test_differences_data as of_data
import test_differences_losses as of_losses
import test_differences_metrics as of_metrics
import test_differences_reference as of_reference
import test_differences_trainer as of_trainer
import torch
from datasets import Dataset, load_dataset
from encoder_decoders import ended_tokenizer, tiny_encoder_decoder
from parity_harness import COMMON, OUTPUTS, POLICY, REFERENCE, RELATIVE, build, classes, padding_tokenizer, run
from tiny_models import standard_rows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from vision_models import PICTURES, processor_of, tiny_vision

pytestmark = pytest.mark.trl

METHODS = ("dpo", "cpo", "tpo")
ONE_STEP = {"max_steps": 1}


def reference(method: str) -> dict[str, Any]:
    """TRL's DPO cannot make one for a model that was built in memory."""
    return {"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}


def train(library: str, method: str, config: dict[str, Any], **arguments: Any) -> Any:
    trainer = build(library, method, config, **reference(method), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def test_01_packed_batches_token_budgets_and_batches_by_length() -> None:
    theirs, ours = (build(library, "dpo", {"padding_free": True}, **reference("dpo")) for library in ("trl", "prefopt"))
    assert theirs.padding_free is False
    (batch,) = next(iter(ours.get_train_dataloader())).micro_batches
    assert batch.model_inputs["input_ids"].shape[0] == 1
    of_trainer.test_packed_batches()
    for method in METHODS:
        of_trainer.test_batches_grouped_by_length(method)
    of_trainer.test_micro_batches_by_a_budget_of_tokens("dpo")


PASSES_OVER_THE_PROMPT = {"dpo": (4, 2), "cpo": (2, 1), "tpo": (3, 1)}
"""In one step of one pair, by policy and reference together: in TRL, in prefopt."""


@pytest.mark.parametrize("method", METHODS)
def test_02_the_prompt_is_computed_once_for_all_completions(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that stands in the prompt alone, counted where it is looked up."""
    rows = standard_rows(1, gold=True)
    rows["prompt"] = ["tutu " + rows["prompt"][0].replace("tutu", "baba")]
    rows |= {column: [rows[column][0].replace("tutu", "baba")] for column in ("chosen", "rejected", "reference")}
    for library, expected in zip(("trl", "prefopt"), PASSES_OVER_THE_PROMPT[method], strict=True):
        config = {**ONE_STEP, "per_device_train_batch_size": 1}
        trainer = build(library, method, config, train_dataset=Dataset.from_dict(rows), **reference(method))
        word, looked_up = trainer.processing_class.convert_tokens_to_ids("tutu"), []
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                model.get_input_embeddings().register_forward_pre_hook(
                    lambda _, inputs, looked_up=looked_up, word=word: looked_up.append(int((inputs[0] == word).sum()))
                )
        trainer.train()
        assert sum(looked_up) == expected


VOCABULARY = 509
"""A prime that no other dimension of the tiny model has."""


class LargestLogits(TorchDispatchMode):
    """The most rows of logits that a tensor held."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dim() > 1 and made.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, made.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_03_no_logits_of_every_position(method: str) -> None:
    """TRL holds a row of logits for every place of the padded batch; prefopt for completion tokens at most."""
    rows = standard_rows(4, gold=True)
    most = {}
    for library in ("trl", "prefopt"):
        model = tiny_model(**POLICY, vocab_size=VOCABULARY)
        trainer = build(library, method, ONE_STEP, model=model, train_dataset=Dataset.from_dict(rows))
        with LargestLogits() as largest:
            trainer.train()
        most[library] = largest.rows
    sides = ("chosen", "rejected", "reference")[: 3 if method == "tpo" else 2]
    lengths = {side: [len(text.split()) + 1 for text in rows[side]] for side in sides}  # and the EOS token
    prompts = [len(text.split()) + 1 for text in rows["prompt"]]
    longest = max(p + c for side in sides for p, c in zip(prompts, lengths[side], strict=True))
    assert most["trl"] >= 4 * len(sides) * (longest - 1)
    embedding = VOCABULARY if most["prefopt"] == VOCABULARY else 0
    assert most["prefopt"] <= max(embedding, sum(map(sum, lengths.values())))


def test_04_precomputed_log_probs_of_streams_and_new_sets_and_never_stale(
    policy_path: str, tmp_path: Path, reference_cache: Path
) -> None:
    of_reference.test_precompute_takes_streams(policy_path)
    of_reference.test_precompute_takes_a_new_set_after_training(policy_path)
    of_reference.test_precomputed_log_probs_are_never_stale(tmp_path)


def test_04_precomputed_log_probs_survive_another_learning_rate(tmp_path: Path, reference_cache: Path) -> None:
    """A run on the same file with the same reference computes none of it again. TRL's key holds the whole config."""
    file = tmp_path / "pairs.jsonl"
    Dataset.from_dict(standard_rows(4)).to_json(file)

    def asked(library: str, learning_rate: float) -> int:
        cache = str(tmp_path / f"cache-{library}")
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        config = {"precompute_ref_log_probs": True, "learning_rate": learning_rate, **ONE_STEP}
        calls: list[Any] = []
        model = tiny_model(**REFERENCE)
        model.register_forward_hook(lambda _, inputs, outputs: calls.append(inputs))
        make_config, make_trainer = classes(library, "dpo")
        trainer = make_trainer(
            tiny_model(**POLICY),
            model,
            make_config(str(tmp_path / library), **{**COMMON, **config}),
            train_dataset=data,
            processing_class=padding_tokenizer(),
        )
        tried = len(calls) if library == "prefopt" else 0  # the layout, on a pair
        trainer.train()
        return len(calls) - tried

    for library in ("trl", "prefopt"):
        assert asked(library, 0.3) > 0
        assert asked(library, 0.3) == 0
        assert bool(asked(library, 0.1)) is (library == "trl")


def test_05_the_reference_is_what_the_policy_starts_from(policy_path: str) -> None:
    of_reference.test_the_reference_is_the_model_that_was_given(policy_path)
    of_reference.test_a_model_without_a_path_has_a_reference()


def test_06_a_moving_reference_goes_with_adapters(policy_path: str) -> None:
    of_reference.test_tr_dpo_goes_with_adapters(policy_path)
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    averaging = {"update_freq": 1, "update_ref_model": True, "ref_model_update_freq": 1, "ema_power": 0.0}

    from trl.experimental.bema_for_ref_model import BEMACallback as TheirCallback
    from trl.experimental.bema_for_ref_model import DPOTrainer as TheirTrainer

    from prefopt import BEMACallback

    arguments = {"model": policy_path, "peft_config": adapter}
    theirs = build("trl", "dpo", {}, **arguments)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        TheirTrainer(
            policy_path,
            args=theirs.args,
            train_dataset=Dataset.from_dict(standard_rows()),
            processing_class=theirs.processing_class,
            peft_config=adapter,
            callbacks=[TheirCallback(**averaging)],
        ).train()
    config = {"learning_rate": 3.0}
    still = run("prefopt", "dpo", config, **arguments)
    moved = run("prefopt", "dpo", config, **arguments, callbacks=[BEMACallback(**averaging)])
    assert moved[0]["loss"] == pytest.approx(still[0]["loss"], rel=1e-6)
    assert moved[2]["rewards/chosen"] != pytest.approx(still[2]["rewards/chosen"], rel=0.1)


def test_07_weights_and_divergences_where_they_are_defined() -> None:
    of_losses.test_wpo_goes_with_sft()
    for loss_type in ("aot", "aot_unpaired"):
        of_losses.test_wpo_goes_with_sorted_losses(loss_type)
    of_losses.test_forward_kl_stays_finite()
    make_config = classes("prefopt", "dpo")[0]
    with pytest.raises(ValueError, match=r"partition function log Z\(x\) cancel"):
        make_config(OUTPUTS.name, loss_type="nca_pair", f_divergence_type="forward_kl", bf16=False)


def test_08_adapters_of_every_kind(policy_path: str) -> None:
    for case in of_reference.REFUSED:
        of_reference.test_adapters_that_trl_refuses(case, policy_path)
    for method in ("cpo", "tpo"):
        of_trainer.test_prompt_tuning(method, policy_path)
    of_reference.test_a_new_adapter_that_acts_from_the_start_is_part_of_the_reference("prefix tuning", policy_path)


def image_rows(count: int = 4) -> Dataset:
    """One image in each prompt."""

    def said(role: str, *parts: str) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {
                "images": [PICTURES[number]],
                "prompt": said("user", "", f"What is number {number}?"),
                "chosen": said("assistant", f"A cat, {number} of them."),
                "rejected": said("assistant", "No."),
                "reference": said("assistant", "Cats."),
            }
            for number in range(count)
        ]
    )


def seeing(method: str) -> dict[str, Any]:
    """Arguments of a trainer for rows with images."""
    made = processor_of("llava")
    models = {"model": tiny_vision("llava", made), "processing_class": made, "train_dataset": image_rows()}
    return models | ({"ref_model": tiny_vision("llava", made)} if method == "dpo" else {})


REFUSED_WITH_IMAGES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "keep_end": ("dpo", {"truncation_mode": "keep_end", "max_length": 40}, ValueError, "keep_end.*not supported"),
    "a multiple": ("dpo", {"pad_to_multiple_of": 16, "max_length": None}, NotImplementedError, "not yet implemented"),
    "precompute": ("dpo", {"precompute_ref_log_probs": True}, ValueError, "not supported for vision"),
    "cpo": ("cpo", {}, AttributeError, "pad_token_id"),
    "tpo": ("tpo", {}, TypeError, "does not currently support vision"),
}


@pytest.mark.parametrize("case", REFUSED_WITH_IMAGES)
def test_09_images_go_with_every_option_and_method(case: str) -> None:
    method, config, error, message = REFUSED_WITH_IMAGES[case]
    with pytest.raises(error, match=message):
        build("trl", method, {**ONE_STEP, **config}, **seeing(method)).train()
    trainer = build("prefopt", method, {**ONE_STEP, **config}, **seeing(method))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert all(len(row["images"]) == 1 for row in trainer.train_dataset)
    places = trainer.processing_class.image_token_id
    assert {row["prompt_ids"].count(places) for row in trainer.train_dataset} == {4}  # each image whole


def test_09_images_are_encoded_once_for_each_pair() -> None:
    """By policy and reference together, in a step of four pairs."""
    for library, expected in (("trl", 16), ("prefopt", 8)):
        arguments, encoded = seeing("dpo"), []
        trainer = build(library, "dpo", ONE_STEP, **arguments)
        for model in (trainer.model, arguments["ref_model"]):
            model.base_model.vision_tower.register_forward_pre_hook(
                lambda _, args, kwargs, encoded=encoded: encoded.append(
                    len(args[0] if args else kwargs["pixel_values"])
                ),
                with_kwargs=True,
            )
        trainer.train()
        assert sum(encoded) == expected


@pytest.mark.parametrize("method", METHODS)
def test_10_encoder_decoder_models_in_every_method(method: str) -> None:
    """TRL's CPO alone takes them; its DPO and TPO give the decoder nothing."""
    arguments: dict[str, Any] = {"processing_class": ended_tokenizer()}
    rows = Dataset.from_dict(standard_rows(4, gold=True))
    models = {
        "model": tiny_encoder_decoder("t5"),
        **({"ref_model": tiny_encoder_decoder("t5")} if method == "dpo" else {}),
    }
    if method != "cpo":
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            build("trl", method, ONE_STEP, **arguments, **models, train_dataset=rows).train()
    log = run("prefopt", method, ONE_STEP, **arguments, **models, train_dataset=rows)
    assert log[0]["grad_norm"] > 0
    assert log[0]["loss"] > 0


def test_10_cpo_takes_what_the_others_take() -> None:
    """`model_init`, a tokenizer without a pad token, a dict of evaluation sets, streams, raw rows in `evaluate`."""
    for case in of_trainer.CPO_CASES:
        of_trainer.test_cpo_takes(case)
    of_trainer.test_cpo_evaluates_raw_rows()


def test_11_every_token_counts_as_it_should() -> None:
    of_data.test_chat_data_of_cpo_ends_once()
    of_data.test_a_row_without_completion_tokens_is_skipped("cpo", "simpo")
    of_losses.test_label_smoothing_acts("sigmoid")
    of_data.test_no_training_on_the_users_turns()


def test_12_metrics_are_those_of_the_set() -> None:
    of_metrics.test_several_evaluation_sets_keep_their_metrics_apart()
    of_metrics.test_evaluation_does_not_depend_on_the_batch_size("dpo")


def test_13_compute_metrics_without_logits() -> None:
    """Rewards and log-probs of each pair; in TRL all logits of the set, which are held until its end."""
    rows = Dataset.from_dict(standard_rows(5, seed=5))
    sizes: dict[str, int] = {}
    for library in ("trl", "prefopt"):

        def count(prediction: Any, library: str = library) -> dict[str, float]:
            arrays = [array for array in prediction.predictions if array is not None]
            sizes[library] = sum(array.size for array in arrays)
            return {}

        config = {"per_device_eval_batch_size": 5}
        build(library, "dpo", config, eval_dataset=rows, compute_metrics=count, **reference("dpo")).evaluate()
    assert sizes["prefopt"] == 4 * len(rows)
    assert sizes["trl"] > 100 * len(rows)
    of_metrics.test_predictions_are_rewards_and_log_probs_of_pairs("cpo")


@pytest.mark.parametrize("layout", ["shared_prompt", "packed", "padded"])
def test_14_experts_are_balanced_in_every_method_and_layout(layout: str) -> None:
    family = {"family": "qwen3_moe", "router_aux_loss_coef": 0.5}
    expected = run("trl", "dpo", {}, model=tiny_model(**family), **reference("dpo"))[0]["aux_loss"]
    log = run("prefopt", "dpo", {"layout": layout}, model=tiny_model(**family), **reference("dpo"))
    assert log[0]["aux_loss"] == pytest.approx(expected, rel=RELATIVE)
    for method in ("cpo", "tpo"):
        assert "aux_loss" in run("prefopt", method, {**ONE_STEP, "layout": layout}, model=tiny_model(**family))[0]
        if layout == "padded":
            assert "aux_loss" not in run("trl", method, ONE_STEP, model=tiny_model(**family))[0]


def test_15_the_default_precision_runs_without_an_accelerator(tmp_path: Path) -> None:
    of_trainer.test_bf16_is_no_error_without_the_hardware(tmp_path)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_16_the_command_line_knows_every_method(method: str, capsys: pytest.CaptureFixture) -> None:
    from trl.cli.main import main as their_main

    from prefopt.cli.main import main

    with pytest.raises(SystemExit) as refusal:
        their_main([method, "--help"])
    assert refusal.value.code == 2
    assert f"invalid choice: '{method}'" in capsys.readouterr().err
    assert main([method, "--help"]) == 0
    assert f"prefopt {method}" in capsys.readouterr().out
