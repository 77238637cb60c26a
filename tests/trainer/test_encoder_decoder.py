"""Encoder-decoder models in the three trainers: rows, runs against the definition, and everything around them."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from encoder_decoders import EOS, LORA, ended_tokenizer, tiny_encoder_decoder, token_examples, token_logps_alone
from live_storages import LiveStorages
from peft import PrefixTuningConfig, PromptTuningConfig
from short_runs import TRAINERS, UNSET, log_rows, relative_difference, weights
from tiny_models import conversational_rows, standard_rows, tiny_model, word_tokenizer
from transformers import AutoModelForSeq2SeqLM

from prefopt import CPOConfig, CPOTrainer
from prefopt.batching import encoder_decoder_batch
from prefopt.data import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.normalise import local_counts, total
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import install, score
from prefopt.scoring.head.plan import uncached
from prefopt.scoring.sequences import sequence_stats
from prefopt.trainer.memory import ActivationModel, BatchSize
from prefopt.trainer.trials import run_trials
from prefopt.types import TRIPLE, SequenceStats, TokenizedExample, TokenStats

LOSS_TOLERANCE = 1e-5
"""Relative, of the second step's loss: a step of SGD doubles the rounding of float32."""
WEIGHT_TOLERANCE = 1e-5
"""Relative norm after a few steps of SGD, between ways of the same run; they round differently."""
STEPS, PAIRS = 2, 3
NO_DROPOUT = {"t5": {"dropout_rate": 0.0}, "bart": {"dropout": 0.0}}
"""``disable_dropout`` of TRL leaves on what is no module of its own: T5's attention, and all of BART."""


def rows(count: int = STEPS * PAIRS, seed: int = 0) -> Dataset:
    return Dataset.from_dict(standard_rows(count, seed=seed, gold=True))


def trainer(folder: Path, method: str = "dpo", kind: str = "t5", *, data: Any = None, **options: Any) -> Any:
    """A trainer of two steps of SGD on the rows in their order."""
    make, config = TRAINERS[method]
    names = (
        "eval_dataset",
        "peft_config",
        "compute_metrics",
        "data_collator",
        "model",
        "model_init",
        "ref_model",
        "processing_class",
    )
    arguments = {name: options.pop(name) for name in names if name in options}
    arguments.setdefault("processing_class", ended_tokenizer(with_bos=kind != "t5"))
    if "model_init" not in arguments:
        arguments.setdefault("model", tiny_encoder_decoder(kind, seed=1))
    options = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": PAIRS,
        "train_sampling_strategy": "sequential",
        "max_completion_length": 128,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    options = {name: value for name, value in options.items() if value is not UNSET}
    return make(
        args=config(str(folder), **options),
        train_dataset=rows() if data is None else data,
        **arguments,
    )


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def stats_alone(model: Any, examples: list[TokenizedExample], branches: Any) -> dict[Any, SequenceStats]:
    """Statistics of every branch, each completion scored in a call of its own."""
    layout = encoder_decoder_batch(examples, branches).layout
    return sequence_stats(TokenStats(torch.cat(token_logps_alone(model, examples, branches))), layout, keep_tokens=True)


def expected_losses(given: Any) -> list[float]:
    """The losses of the run's steps by the definition."""
    model, reference = deepcopy(given.model).eval(), deepcopy(given.model).eval()
    objective = given.args.objective()
    examples = [tokenized_example(row, objective.branches) for row in given.train_dataset]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], given.args.learning_rate)
    found = []
    for step in range(STEPS):
        own = examples[step * PAIRS : (step + 1) * PAIRS]
        batch = encoder_decoder_batch(own, objective.branches)
        with torch.no_grad():
            theirs = stats_alone(reference, own, objective.branches) if objective.needs_reference else None
        terms = objective(stats_alone(model, own, objective.branches), theirs)
        loss = total(terms, batch, local_counts([batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("method", TRAINERS)
def test_two_steps_have_the_losses_of_the_definition(
    method: str, kind: str, streamed: bool, with_adapter: bool, tmp_path: Path
) -> None:
    data = rows().to_iterable_dataset() if streamed else rows()
    run = trainer(tmp_path, method, kind, data=data, peft_config=LORA() if with_adapter else None)
    assert run.layout.layout == "encoder_decoder"
    expected, before = expected_losses(run), weights(run.model)
    encoded: list[int] = []
    encoder = run.model.get_base_model().get_encoder() if with_adapter else run.model.get_encoder()
    encoder.register_forward_hook(lambda *call: encoded.append(len(call[-1].last_hidden_state)))
    run.train()
    assert losses(run) == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert abs(expected[1] - expected[0]) > 100 * LOSS_TOLERANCE * expected[0]
    assert relative_difference(weights(run.model), before) > 0
    passes = 2 if method == "dpo" and with_adapter else 1  # the reference is this model, without its adapter
    assert encoded == [PAIRS] * STEPS * passes


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(adapter: Any, kind: str, tmp_path: Path) -> None:
    """In front of the prompt, in the encoder; or keys and values in front of the completion, in the decoder."""
    adapter = adapter(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    run = trainer(tmp_path, "cpo", kind, peft_config=adapter, learning_rate=1.0)
    expected, before = expected_losses(run), weights(run.model)
    run.train()
    assert losses(run) == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert expected[0] != expected[1]
    assert relative_difference(weights(run.model), before) > 0


def test_every_way_to_the_same_step_gives_the_same_weights(tmp_path: Path) -> None:
    """Micro-batches by number and by a budget of tokens, recomputed activations, a precomputed reference."""
    ways: list[dict[str, Any]] = [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PAIRS},
        {"tokens_per_batch": 60},
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"pad_to_multiple_of": 8},
        {"dataloader_num_workers": 1},
    ]
    found = []
    for number, options in enumerate(ways):
        run = trainer(tmp_path / str(number), **options)
        run.train()
        found.append((weights(run.model), losses(run)))
    for own, values in found[1:]:
        assert relative_difference(own, found[0][0]) < WEIGHT_TOLERANCE
        assert values == pytest.approx(found[0][1], rel=LOSS_TOLERANCE)


def test_no_micro_batch_is_above_the_budget_of_tokens(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=rows(30), tokens_per_batch=90, per_device_train_batch_size=15)
    for step in run.get_train_dataloader():
        assert len(step.micro_batches) > 1
        for batch in step.micro_batches:
            assert sum(batch.model_inputs[name].numel() for name in ("input_ids", "labels")) <= 90


def test_checkpointing_is_decided_by_a_trial_of_both_bodies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, gradient_checkpointing=UNSET)
    with caplog.at_level(logging.INFO):
        run.train()
    assert "activation checkpointing: off (" in caplog.text
    positions = [
        sum(batch.model_inputs[name].numel() for name in ("input_ids", "labels"))
        for step in run.get_train_dataloader()
        for batch in step.micro_batches
    ]
    assert max(positions) <= 1.5 * run.largest_batch().tokens


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_estimate_of_memory_is_that_of_both_bodies(kind: str) -> None:
    """Against the storages that are alive after the forward, whoever holds them."""
    model = tiny_encoder_decoder(kind, **({"max_position_embeddings": 1024} if kind == "bart" else {}))
    install(model)
    (example,) = token_examples(1, TRIPLE[:2], 1)
    ids = {"chosen": [5] * 260, "rejected": [6] * 200}
    masks = {branch: [True] * len(tokens) for branch, tokens in ids.items()}
    example = replace(example, prompt_ids=[7] * 150, completion_ids=ids, loss_masks=masks)
    trials = run_trials(model, example, TRIPLE[:2], "encoder_decoder", precision=torch.enable_grad)
    batch = encoder_decoder_batch([example, example], TRIPLE[:2])
    inputs = [*batch.model_inputs.values(), batch.predict_from, batch.targets]
    live = LiveStorages([*model.parameters(), *model.buffers(), *inputs])
    with live, segment_attention(model), uncached():
        tokens = score(model, batch).tokens
        kept = live.bytes()
    assert tokens.logps.requires_grad
    size = 2 * (150 + 2 * 260)
    estimate = ActivationModel.fit(trials.counts).bytes(BatchSize(size, size // 2))
    assert 0.8 * kept < estimate < 1.6 * kept


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    found = [
        trainer(
            tmp_path / str(size), "tpo", "bart", eval_dataset=rows(9, seed=1), per_device_eval_batch_size=size
        ).evaluate()
        for size in (1, 4, 9)
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            if "runtime" not in name and "per_second" not in name and "time" not in name:
                assert other[name] == pytest.approx(value, rel=1e-5), name
    assert found[0]["eval_logps/chosen"] < 0


def test_compute_metrics_gets_logits_of_the_decoder(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.extend(logits.shape for logits in prediction.predictions.logits)
        return {"first": float(prediction.label_ids.chosen[0])}

    run = trainer(tmp_path, eval_dataset=rows(3), compute_metrics=metrics, full_logits_for_metrics=True)
    assert run.evaluate()["eval_first"] > 0
    assert len(shapes) == 3
    assert {(shape[0], shape[2]) for shape in shapes} == {(2, 64)}


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "data": rows(12)}
    whole = trainer(tmp_path / "run", **options)
    whole.train()
    resumed = trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert log_rows(whole)[2:4] == log_rows(resumed)[2:4]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_trained_model_is_saved_and_writes(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", "cpo", kind)
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert "prefopt" not in (tmp_path / "model" / "config.json").read_text()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    prompts = torch.tensor([[9, 10, 11, EOS]])
    written = run.model.generate(prompts, max_new_tokens=5)
    assert torch.equal(written, loaded.generate(prompts, max_new_tokens=5))
    named = trainer(tmp_path / "again", "cpo", kind, model=str(tmp_path / "model"))
    assert type(named.model) is type(loaded)
    named.train()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_samples_of_an_evaluation_are_what_the_decoder_writes(kind: str, tmp_path: Path) -> None:
    """BART's decoder starts with EOS, which is not the end."""
    options = {"generate_during_eval": True, "num_eval_samples": 2, "eval_sample_tokens": 4}
    run = trainer(tmp_path, "cpo", kind, eval_dataset=rows(2, seed=3), eval_strategy="steps", eval_steps=1, **options)
    tokenizer = run.processing_class
    prompt = torch.tensor([run.eval_dataset[0]["prompt_ids"]])
    written = run.model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=1)[0, 1:]
    run.train()
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["policy"] == tokenizer.decode(written, skip_special_tokens=True) != ""


# -- what a run is given ---------------------------------------------------------------------------------------------


def test_a_model_that_is_made_later_needs_a_word(tmp_path: Path) -> None:
    def make() -> Any:
        return tiny_encoder_decoder("t5", seed=1)

    for method in TRAINERS:
        run = trainer(tmp_path, method, model_init=make, is_encoder_decoder=True)
        run.train()
        assert run.layout.layout == "encoder_decoder"
    with pytest.raises(ValueError, match="needs is_encoder_decoder=True"):
        trainer(tmp_path, model_init=make)


def test_an_option_that_contradicts_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is_encoder_decoder=False: the model \('t5'\) is an encoder-decoder"):
        trainer(tmp_path, is_encoder_decoder=False)
    with pytest.raises(ValueError, match=r"is_encoder_decoder=True: the model \('llama'\) is a decoder-only model"):
        trainer(tmp_path, model=tiny_model(), is_encoder_decoder=True)


def test_policy_and_reference_are_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy and reference must be of one kind"):
        trainer(tmp_path, ref_model=tiny_model())
    other = trainer(tmp_path, ref_model=tiny_encoder_decoder("bart", seed=2))
    other.train()
    assert losses(other)[0] != pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)


def test_a_collator_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data_collator` was given for an encoder-decoder model"):
        trainer(tmp_path, data_collator=lambda given: {})


def test_another_layout_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, "cpo", layout="packed")
    line = next(record for record in caplog.records if "batch layout" in record.message)
    assert line.levelno == logging.WARNING
    assert line.message.startswith("batch layout: encoder_decoder (T5ForConditionalGeneration reads prompts in its ")


def test_the_default_length_of_completions_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {**standard_rows(2), "rejected": [" baba" * 200, " dada" * 150]}
    run = trainer(tmp_path, data=Dataset.from_dict(long), max_completion_length=None)
    assert caplog.text.count("Completions are cut to 128 tokens") == 1
    assert [len(row["rejected_ids"]) for row in run.train_dataset] == [128, 128]
    caplog.clear()
    trainer(tmp_path, model=tiny_model(), processing_class=word_tokenizer(), max_completion_length=5)
    assert "max_completion_length=5 has no effect" in caplog.text


# -- rows ------------------------------------------------------------------------------------------------------------


def prepared(data: dict[str, Any], tokenizer: Any = None, **options: Any) -> Dataset:
    settings: dict[str, Any] = {"max_length": None, "truncation_mode": "keep_start", "max_completion_length": 128}
    wanted = PrepareOptions(TRIPLE if "reference" in data else TRIPLE[:2], **{**settings, **options})
    found = prepare_dataset(Dataset.from_dict(data), tokenizer or ended_tokenizer(), wanted, name="train")
    assert isinstance(found, Dataset)
    return found


@pytest.mark.parametrize("with_bos", [False, True])
def test_prompt_and_completions_have_their_own_special_tokens(with_bos: bool) -> None:
    data, tokenizer = standard_rows(5, gold=True), ended_tokenizer(with_bos=with_bos)
    for row, prompt, chosen, gold in zip(
        prepared(data, tokenizer), data["prompt"], data["chosen"], data["reference"], strict=True
    ):
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert row["chosen_ids"] == tokenizer(text_target=chosen)["input_ids"]
        assert row["reference_ids"] == tokenizer(text_target=gold)["input_ids"]
        assert row["chosen_mask"] == [True] * len(row["chosen_ids"])


def test_a_completion_ends_once() -> None:
    data = {"prompt": ["baba"] * 3, "chosen": ["dada </s>", "dada </s> </s>", "dada"], "rejected": ["fafa"] * 3}
    silent = word_tokenizer(with_bos=False)  # adds nothing of itself
    for tokenizer in (ended_tokenizer(), silent):
        for row in prepared(data, tokenizer):
            assert row["chosen_ids"].count(EOS) == 1
            assert row["chosen_ids"][-1] == EOS


def test_conversations_are_rendered_and_end_once() -> None:
    data, tokenizer = conversational_rows(4, gold=True), ended_tokenizer()
    for number, row in enumerate(prepared(data, tokenizer)):
        prompt = tokenizer.apply_chat_template(data["prompt"][number], add_generation_prompt=True, tokenize=False)
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert row["prompt_ids"].count(EOS) == 1
        said = tokenizer(data["chosen"][number][0]["content"] + " <|im_end|> ")["input_ids"]
        assert row["chosen_ids"] == said
        assert all(row["chosen_mask"])


def test_turns_of_the_user_are_context_of_the_decoder() -> None:
    turns = [
        {"role": "assistant", "content": "baba"},
        {"role": "user", "content": "dada"},
        {"role": "assistant", "content": "fafa"},
    ]
    other = [{"role": "assistant", "content": "gaga"}]
    data = {"prompt": [[{"role": "user", "content": "kaka"}]], "chosen": [turns], "rejected": [other]}
    tokenizer = ended_tokenizer()
    (row,) = prepared(data, tokenizer)
    words = tokenizer.convert_ids_to_tokens(row["chosen_ids"])
    masked = [word for word, scored in zip(words, row["chosen_mask"], strict=True) if not scored]
    assert "dada" in masked
    assert not {"baba", "fafa", "</s>"} & set(masked)


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(0, 3)), ("keep_end", slice(-3, None))])
def test_a_prompt_keeps_its_special_tokens_and_a_cut_completion_has_no_end(mode: str, kept: slice) -> None:
    words = ["baba", "bebe", "bibi", "bobo", "bubu"]
    data = {"prompt": [" ".join(words)], "chosen": ["dada dede didi dodo"], "rejected": ["fafa"]}
    tokenizer = ended_tokenizer(with_bos=True)
    found = prepared(data, tokenizer, max_length=5, truncation_mode=mode, max_completion_length=3)
    (row,) = found
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", *words[kept], "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["<s>", "dada", "dede"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["<s>", "fafa", "</s>"]
    assert prepare_report(found).num_truncated == 1


def test_rows_with_nothing_to_learn_are_skipped() -> None:
    data = {"prompt": ["baba"] * 4, "chosen": ["dada", "</s>", "fafa fafa fafa gaga", " "], "rejected": ["fafa"] * 4}
    data["rejected"][2] = "fafa fafa fafa"
    found = prepared(data, max_completion_length=3)
    assert [row["row"] for row in found] == [0]
    skipped = prepare_report(found).skipped
    assert skipped == {"empty completion": [1, 3], "chosen equal to rejected within max_length": [2]}


# -- beside TRL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cpo_has_the_losses_of_trl(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry otherwise
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.cpo")
    data = rows().select_columns(["prompt", "chosen", "rejected"])
    options: dict[str, Any] = {
        "loss_type": "simpo",
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": PAIRS,
        "max_completion_length": 128,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    found = []
    for make, config in ((CPOTrainer, CPOConfig), (trl.CPOTrainer, trl.CPOConfig)):
        tokenizer = ended_tokenizer(with_bos=kind != "t5")
        tokenizer.pad_token = "<unk>"
        run = make(
            tiny_encoder_decoder(kind, seed=1, **NO_DROPOUT[kind]),
            args=config(str(tmp_path), **options),
            train_dataset=data,
            processing_class=tokenizer,
        )
        run.train()
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
