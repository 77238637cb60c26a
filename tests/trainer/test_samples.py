"""Samples during evaluation: what is generated, when, by which weights, and where it goes."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from encoder_decoders import EOS
from families import tiny
from peft import LoraConfig, PromptTuningConfig
from short_runs import TRAINERS, dataset, log_rows, trainer, weights
from test_encoder_decoder import trainer as encoder_decoder_trainer
from test_vision import rows as image_rows
from test_vision import trainer as vision_trainer
from tiny_models import tiny_model, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt import DPOConfig, DPOTrainer
from prefopt.data import tokenized_example
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import install
from prefopt.trainer.generation import generated
from prefopt.trainer.samples import Sample, SampleTable, send, summary
from prefopt.trainer.sampling import SampleCallback
from prefopt.types import PAIR, TokenizedExample

LENGTHS = (3, 9, 1, 6)
"""Of the prompts: the shorter ones are padded."""
NEW_TOKENS = 7
SAMPLING: dict[str, Any] = {"generate_during_eval": True, "num_eval_samples": 3, "eval_sample_tokens": 5}


def prompts(vocabulary: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(9, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def example(prompt: list[int]) -> TokenizedExample:
    return TokenizedExample(0, prompt, {"chosen": [9], "rejected": [10]}, {"chosen": [True], "rejected": [True]})


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int, ends: tuple[int, ...] = (2,)) -> list[int]:
    """The oracle: the most probable token of a forward pass over all that stands there, again and again."""
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def padding_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def texts(model: Any, rows: Any, count: int = 5) -> list[str]:
    """What the oracle says to the prompts of the first three rows, as text."""
    tokenizer = padding_tokenizer()
    prompts = (tokenizer(prompt)["input_ids"] for prompt in rows["prompt"][:3])
    model = deepcopy(model).eval()
    return [tokenizer.decode(greedy(model, prompt, count), skip_special_tokens=True) for prompt in prompts]


# -- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "cohere2", "opt"])
def test_completions_are_those_of_the_untouched_model(family: str) -> None:
    """In one padded batch, with segments understood and scoring installed, while the model is in training mode."""
    model = tiny(family)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]
    model.train()
    with segment_attention(model):
        found = generated(model, [example(prompt) for prompt in prompts()], padding_tokenizer(), NEW_TOKENS)
    assert found == expected
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "falcon_h1", "qwen3_next"])
def test_recurrent_models_generate(family: str) -> None:
    model = tiny(family)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]
    assert generated(model, [example(p) for p in prompts()], padding_tokenizer(), NEW_TOKENS) == expected


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(seed=1)
    install(model)
    model.train()
    model.model.norm.eval()
    model.generation_config.update(do_sample=True, temperature=0.3, max_length=4)
    modes = [module.training for module in model.modules()]
    config = model.generation_config.to_dict()
    with segment_attention(model):
        name = model.config._attn_implementation
        forward = model.forward
        generated(model, [example([9, 10])], padding_tokenizer(), 3)
        assert model.config._attn_implementation == name
        assert model.forward == forward
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == config


def test_a_config_that_samples_is_not_followed() -> None:
    model = tiny_model(seed=1)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=2, max_length=4)
    for _ in range(2):
        assert generated(model, [example(p) for p in prompts()], padding_tokenizer(), NEW_TOKENS) == expected


@pytest.mark.parametrize("said_by", ["model", "tokenizer"])
def test_a_completion_stops_at_its_end(said_by: str) -> None:
    """The end tokens of the model's config (one or several) and of the tokenizer; what follows is not shown."""
    model, tokenizer = tiny_model(seed=1), padding_tokenizer()
    free = greedy(model, [9, 10, 11], NEW_TOKENS, ends=())
    end = free[3]
    if said_by == "model":
        model.generation_config.eos_token_id = [5, end]
    else:
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    assert generated(model, [example([9, 10, 11])], tokenizer, NEW_TOKENS) == [free[: free.index(end)]]


def test_a_completion_ends_with_the_context() -> None:
    size = {"vocab_size": 64, "n_positions": 12, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**size, eos_token_id=63)).eval()
    (found,) = generated(model, [example([9] * 10)], padding_tokenizer(), NEW_TOKENS)
    assert 0 < len(found) <= 2


def test_compiled_layers_are_not_compiled_for_it() -> None:
    model = tiny_model(seed=1)
    expected = [greedy(model, [9, 10, 11], NEW_TOKENS)]
    install(model)
    compiled: list[int] = []
    for layer in model.model.layers:
        layer.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    assert generated(model, [example([9, 10, 11])], padding_tokenizer(), NEW_TOKENS) == expected
    assert not compiled


# -- when, and by which weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINERS)
def test_before_at_every_evaluation_and_after(method: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Three prompts, two at a time."""
    held_out, options = dataset(5, seed=5), {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    run = trainer(tmp_path, method, eval_dataset=held_out, max_steps=5, **options, **SAMPLING)
    start = deepcopy(run.model)
    run.train()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [step for step in (0, 2, 4, 5) for _ in range(3)]
    assert [line["prompt"] for line in found] == held_out["prompt"][:3] * 4
    assert [line["chosen"] for line in found[:3]] == [text.strip() for text in held_out["chosen"][:3]]
    assert [line["rejected"] for line in found[-3:]] == [text.strip() for text in held_out["rejected"][:3]]
    assert {line["set"] for line in found} == {"eval"}
    before, after = texts(start, held_out), texts(run.model, held_out)
    assert [line["policy"] for line in found[:3]] == before
    assert [line["policy"] for line in found[-3:]] == after != before
    if method == "dpo":
        assert [line["reference"] for line in found] == before * 4
    else:
        assert all("reference" not in line for line in found)
    shown = capsys.readouterr()
    assert "samples of eval at step 4, the first of 3" in shown.out + shown.err
    assert found[0]["prompt"] in shown.out + shown.err


@pytest.mark.parametrize("method", TRAINERS)
def test_samples_change_no_number(method: str, tmp_path: Path) -> None:
    options = {"eval_dataset": dataset(5, seed=5), "eval_strategy": "steps", "eval_steps": 2, "disable_dropout": False}
    runs = [trainer(tmp_path / name, method, **options, **more) for name, more in (("a", SAMPLING), ("b", {}))]
    for run in runs:
        run.train()
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert log_rows(runs[0]) == log_rows(runs[1])


def test_a_last_evaluation_is_not_sampled_twice(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=dataset(5), max_steps=4, eval_strategy="steps", eval_steps=2, **SAMPLING)
    run.train()
    assert sorted({line["step"] for line in lines(tmp_path)}) == [0, 2, 4]
    assert len(lines(tmp_path)) == 9


def test_the_best_model_is_sampled_where_it_is_loaded(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=dataset(5),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        **SAMPLING,
    )
    run.train()
    assert [line["policy"] for line in lines(tmp_path)[-3:]] == texts(run.model, dataset(5))
    assert [line["step"] for line in lines(tmp_path)] == [step for step in (0, 2, 4, 4) for _ in range(3)]


ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "lora that acts from the start": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_on_for_the_policy_and_as_it_began_for_the_reference(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    run = trainer(tmp_path, eval_dataset=dataset(5), learning_rate=0.3, peft_config=ADAPTERS[kind], **SAMPLING)
    run.train()
    found = lines(tmp_path)
    first, last = ([line["policy"] for line in part] for part in (found[:3], found[-3:]))
    assert [line["reference"] for line in found] == first * 2
    assert first != last
    if kind == "lora":
        assert first == texts(tiny_model(seed=1), dataset(5))
        assert last == texts(run.model.merge_and_unload(), dataset(5))


def test_a_reference_that_moves_is_asked_again(tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    run = trainer(tmp_path, eval_dataset=dataset(5), max_steps=4, **moving, **SAMPLING)
    run.train()
    found = lines(tmp_path)
    assert [line["reference"] for line in found[-3:]] == [line["policy"] for line in found[-3:]]
    assert [line["reference"] for line in found[-3:]] != [line["reference"] for line in found[:3]]


def test_a_reference_that_stays_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = SampleCallback.completions

    def counted(self: Any, model: Any, examples: Any) -> list[str]:
        asked.append(model)
        return original(self, model, examples)

    monkeypatch.setattr(SampleCallback, "completions", counted)
    run = trainer(tmp_path, eval_dataset=dataset(5), max_steps=4, eval_strategy="steps", eval_steps=1, **SAMPLING)
    run.train()
    assert [model is run.model for model in asked] == [True, False, True, True, True, True]


def test_precomputed_references_speak_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=dataset(5), max_steps=2, precompute_ref_log_probs=True, **SAMPLING)
    start = texts(run.model, dataset(5))
    run.train()
    assert [line["reference"] for line in lines(tmp_path)] == start * 2


def test_an_encoder_decoder_speaks_too(tmp_path: Path) -> None:
    run = encoder_decoder_trainer(tmp_path, "dpo", "bart", eval_dataset=dataset(5), max_completion_length=4, **SAMPLING)
    start = deepcopy(run.model).eval()
    run.train()
    expected = []
    for row in run.eval_dataset.select(range(3)):
        said = [start.config.decoder_start_token_id]
        while len(said) <= SAMPLING["eval_sample_tokens"]:
            logits = start(input_ids=torch.tensor([row["prompt_ids"]]), decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == EOS:
                break
        expected.append(run.processing_class.decode(said[1:], skip_special_tokens=True))
    found = lines(tmp_path)
    assert [line["policy"] for line in found[:3]] == expected
    assert [line["reference"] for line in found] == expected * 2


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "idefics3"])
def test_prompts_with_images(family: str, tmp_path: Path) -> None:
    """Rows of one image, of two and of none, in one batch: as one by one, without padding and without a cache."""
    run = vision_trainer(tmp_path, "dpo", family=family, eval_dataset=image_rows(), max_steps=1, **SAMPLING)
    start = deepcopy(run.model).eval()
    run.train()
    expected = []
    for row in run.eval_dataset.select(range(3)):
        example = tokenized_example(row, PAIR)
        pixels, ids = run.vision.tensors(example.images.get("prompt", ())), list(example.prompt_ids)
        for _ in range(SAMPLING["eval_sample_tokens"]):
            tokens = torch.tensor([ids])
            logits = start(input_ids=tokens, **run.vision.token_kinds(tokens), **pixels, use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        tokenizer = run.processing_class.tokenizer
        expected.append(tokenizer.decode(ids[len(example.prompt_ids) :], skip_special_tokens=True))
    found = lines(tmp_path)
    assert [line["policy"] for line in found[:3]] == expected
    assert [line["reference"] for line in found] == expected * 2
    assert len(set(expected)) > 1


def test_dropout_is_off(tmp_path: Path) -> None:
    model = tiny_model(seed=1, attention_dropout=0.9)
    run = trainer(tmp_path, model=model, eval_dataset=dataset(5), max_steps=1, disable_dropout=False, **SAMPLING)
    before = texts(run.model, dataset(5))
    run.train()
    assert [line["policy"] for line in lines(tmp_path)[:3]] == before


# -- of which sets -------------------------------------------------------------------------------------------------


def test_every_set_has_its_samples(tmp_path: Path) -> None:
    """A dict of a set and a stream; then a raw set, with which the table has another name."""
    sets = {"one": dataset(2, seed=5), "two": dataset(5, seed=6).to_iterable_dataset()}
    run = trainer(tmp_path, eval_dataset=sets, max_steps=2, eval_strategy="steps", eval_steps=2, **SAMPLING)
    run.train()
    found = [(line["set"], line["step"]) for line in lines(tmp_path)]
    rounds = [[("eval_one", step)] * 2 + [("eval_two", step)] * 3 for step in (0, 2)]
    assert found == rounds[0] + rounds[1]
    run.evaluate(dataset(4, seed=7), metric_key_prefix="new")
    assert [line["set"] for line in lines(tmp_path)[len(found) :]] == ["new"] * 3
    assert lines(tmp_path)[-1]["prompt"] == dataset(4, seed=7)["prompt"][2]


def test_without_an_evaluation_set_there_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "prefopt"):
        run = trainer(tmp_path, max_steps=1, **SAMPLING)
    assert "there is no `eval_dataset`" in caplog.text
    run.train()
    assert not (tmp_path / "samples.jsonl").exists()
    run.evaluate(dataset(4))
    assert len(lines(tmp_path)) == 3


def test_a_prompt_is_as_the_models_are_trained_on_it(tmp_path: Path) -> None:
    """Cut at its start where that is so."""
    rows = Dataset.from_dict({"prompt": ["baba " * 9 + "bebe bibi bobo"], "chosen": [" dada"], "rejected": [" dede"]})
    cut = {"max_length": 4, "truncation_mode": "keep_end"}
    trainer(tmp_path, rows=rows, eval_dataset=rows, max_steps=1, **cut, **SAMPLING).train()
    assert lines(tmp_path)[0]["prompt"] == "bibi bobo"


@pytest.mark.parametrize("with_bos", [True, False])
def test_an_empty_prompt(with_bos: bool) -> None:
    """The model goes on from the token that begins a text, or from the one that ends the text before."""
    tokenizer = word_tokenizer(with_bos=with_bos)
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(seed=1)
    expected = [greedy(model, [1 if with_bos else 2], NEW_TOKENS), greedy(model, [9, 10], NEW_TOKENS)]
    assert generated(model, [example([]), example([9, 10])], tokenizer, NEW_TOKENS) == expected


# -- the file ------------------------------------------------------------------------------------------------------


def test_the_file_is_that_of_the_run(tmp_path: Path) -> None:
    """A new run in the same folder begins it anew; a resumed one goes on where its checkpoint was made."""
    options = {"eval_dataset": dataset(5), "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    for _ in range(2):
        trainer(tmp_path, max_steps=4, save_steps=2, **options, **SAMPLING).train()
        whole = lines(tmp_path)
        assert [line["step"] for line in whole] == [step for step in (0, 2, 4) for _ in range(3)]
    resumed = trainer(tmp_path, max_steps=4, save_steps=2, **options, **SAMPLING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines(tmp_path) == whole


def test_every_trial_of_a_search_has_its_file(tmp_path: Path) -> None:
    """Also the reference's completions are those of the trial: `model_init` may make another model each time."""
    pytest.importorskip("optuna")
    config = DPOConfig(
        str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, report_to="none", disable_tqdm=True, **SAMPLING
    )
    run = DPOTrainer(
        None,
        args=config,
        train_dataset=dataset(8),
        eval_dataset=dataset(5),
        processing_class=word_tokenizer(),
        model_init=lambda trial: tiny_model(seed=trial.number if trial else 0),
    )
    run.hyperparameter_search(lambda trial: {"beta": trial.suggest_float("beta", 0.1, 0.2)}, n_trials=2)
    for number in range(2):
        found = lines(tmp_path / f"run-{number}")
        assert [line["step"] for line in found] == [0] * 3 + [1] * 3
        assert [line["reference"] for line in found] == texts(tiny_model(seed=number), dataset(5)) * 2


# -- trackers ------------------------------------------------------------------------------------------------------


class TensorBoardCallback:
    """A tracker that keeps what it is given; found by the name of its class."""

    def __init__(self, fails: bool = False) -> None:
        self.shown: list[tuple[str, str, int]] = []
        self.fails = fails
        self.tb_writer = SimpleNamespace(add_text=self.add_text)

    def add_text(self, tag: str, text: str, step: int) -> None:
        if self.fails:
            raise ConnectionError("no route")
        self.shown.append((tag, text, step))


class OfTheUsers(TensorBoardCallback):
    pass


TABLE = SampleTable("eval", 7, [Sample("a | b", "c\nd", "<e>", "f " * 200, None)])


def test_a_tracker_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = OfTheUsers(), TensorBoardCallback(fails=True)
    with caplog.at_level(logging.WARNING, "prefopt"):
        send(TABLE, [object(), bad, good])
    assert "TensorBoardCallback did not take the samples of step 7: ConnectionError('no route')" in caplog.text
    ((tag, text, step),) = good.shown
    assert (tag, step) == ("eval/samples", 7)
    assert text.splitlines()[0] == "| step | prompt | chosen | rejected | policy |"
    assert text.splitlines()[2].startswith("| 7 | a &#124; b | c<br>d | &lt;e&gt; | f f ")


def test_the_log_shows_one_sample_in_a_few_lines() -> None:
    shown = summary(TABLE).splitlines()
    assert len(shown) == 5
    assert all(len(line) <= 130 for line in shown)
    assert shown[2] == "  chosen     c d"
    assert shown[4].endswith(" …")
