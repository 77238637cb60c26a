"""The reference: looked up only where nothing that it depends on has changed, and at the start equal to the policy."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from short_runs import dataset, trainer
from tiny_models import WORDS, standard_rows, tiny_model, word_tokenizer
from tokenizers import Tokenizer
from vision_models import PICTURES, processor_of, tiny_vision

from prefopt import DPOConfig, DPOTrainer
from prefopt.files import Operation, observed
from prefopt.reference import ReferenceCache
from prefopt.reference.policy import ModelReference
from prefopt.trainer import steps

ROWS = 8
LOG_PROBS = 1e-6
"""Relative: policy and reference are the same weights in the same kernels; float32 rounds at 6e-8."""

# -- the cache: every input misses ----------------------------------------------------------------------------------


def chats() -> Dataset:
    """Rows as messages, of which most are longer than the limit of `BASE`."""
    rows = standard_rows(ROWS)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]],
            "chosen": [[{"role": "assistant", "content": text}] for text in rows["chosen"]],
            "rejected": [[{"role": "assistant", "content": text}] for text in rows["rejected"]],
        }
    )


BASE: dict[str, Any] = {"max_length": 14, "max_steps": 2, "per_device_train_batch_size": 4}


def run(folder: Path, **options: Any) -> Any:
    """Two steps over all rows; ``adapter`` is put on the model, ``processing_class`` takes the tokenizer's place."""
    tokenizer = options.pop("processing_class", None) or word_tokenizer()
    model = options.pop("model", None) or tiny_model(seed=1)
    rows = options.pop("rows", None) or chats()
    settings: dict[str, Any] = {"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
    made = DPOTrainer(
        model,
        args=DPOConfig(str(folder), **{**settings, "learning_rate": 1e-2, "disable_tqdm": True, **BASE, **options}),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    made.train()
    return made


def acting(scale: float = 1.0) -> Any:
    """A model with an adapter that was trained before."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=8 * scale)
    torch.manual_seed(5)
    return peft.get_peft_model(tiny_model(seed=1), config)


def eager() -> Any:
    model = tiny_model(seed=1)
    model.set_attn_implementation("eager")
    return model


def template(text: str) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", text)
    return tokenizer


def renumbered() -> Any:
    """The tokenizer with its words in another order."""
    tokenizer = word_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    content["model"]["vocab"] |= dict(zip(WORDS, [words[word] for word in reversed(WORDS)], strict=True))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "token ids": lambda: {"rows": chats().rename_columns({"chosen": "rejected", "rejected": "chosen"})},
    "longest sequence": lambda: {"max_length": 20},
    "truncation side": lambda: {"truncation_mode": "keep_end"},
    "ld_alpha": lambda: {"ld_alpha": 0.5},
    "weights of the reference": lambda: {"model": tiny_model(seed=2)},
    "config of the reference": lambda: {"model": tiny_model(seed=1, rms_norm_eps=1e-3)},
    "adapter": lambda: {"model": acting()},
    "precision of the weights": lambda: {"model": tiny_model(seed=1).to(torch.bfloat16)},
    "autocast": lambda: {"bf16": True},
    "precision of products": lambda: {"matmul": "high"},
    "attention kernel": lambda: {"model": eager()},
    "chat template": lambda: {"processing_class": template("</s>")},
    "tokenizer": lambda: {"processing_class": renumbered()},
}
"""What decides a log-prob, changed. The image and the image processor: `test_a_changed_image_misses`."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that a reference's model scores."""
    calls: list[int] = []
    original = ModelReference.__call__
    monkeypatch.setattr(
        ModelReference, "__call__", lambda self, batch: calls.extend(batch.rows) or original(self, batch)
    )
    return calls


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The cache after one run, and the rows of that run as they were prepared."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        return folder / "cache", run(folder).train_dataset.to_list()


def test_the_same_run_hits(
    filled: Any, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str, str], None]
) -> None:
    """Also with other options of training, and with the model loaded from a file."""
    monkeypatch.setenv("PREFOPT_CACHE", str(filled[0]))
    run(tmp_path)
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    run(tmp_path, beta=0.7, learning_rate=1e-3, seed=5, layout="padded", model=str(tmp_path / "model"))
    assert asked == []
    figure("reference cache", "the same: 0 rows asked")


@pytest.mark.parametrize("change", INPUTS)
def test_a_changed_input_misses(
    change: str, filled: Any, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    """Every row whose tokens are others is asked for, or every row where what scores them is another."""
    cache, before = filled
    shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    options = INPUTS[change]()
    torch_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(options.pop("matmul", torch_precision))
    try:
        rows = run(tmp_path, **options).train_dataset.to_list()
    finally:
        torch.set_float32_matmul_precision(torch_precision)
    others = {row["row"] for row in rows if row not in before}
    expected = others or {row["row"] for row in rows}
    assert expected <= set(asked)
    assert expected
    figure(f"reference cache: {change}", f"{len(expected)} of {ROWS} rows changed, {len(set(asked))} asked")


def test_a_changed_image_misses(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str, str], None]
) -> None:
    """As many tokens, another picture; then another processor."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))

    def score(picture: int, mean: float | None = None) -> int:
        made = processor_of("llava")
        if mean is not None:
            made.image_processor.image_mean = [mean] * 3
        rows = [
            {
                "images": [PICTURES[picture]],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{number}?"}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
            }
            for number in range(2)
        ]
        settings: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        asked.clear()
        DPOTrainer(
            tiny_vision("llava", made),
            args=DPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=made,
        ).train()
        return len(asked)

    counts = [score(0), score(0), score(1), score(1, 0.1)]
    assert counts == [2, 0, 2, 2]
    figure("reference cache: image, its processor", f"asked {counts[2]} and {counts[3]} of 2 rows")


# -- the cache: a file that was cut short ---------------------------------------------------------------------------

KEYS = {bytes([number]) * 16: (-1.0 - number, -2.0 - number) for number in range(4)}


def write_until(folder: Path, last: int, torn: bool) -> None:
    """Write a shard and be killed before operation ``last``, with a file torn in two if it was being written."""
    count = 0

    def kill(operation: Operation, path: Path) -> None:
        nonlocal count
        count += 1
        if count <= last:
            return
        if torn and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with observed(kill):
        cache = ReferenceCache(folder, "a")
        cache.put(KEYS)
        cache.flush()


@pytest.mark.parametrize("torn", [False, True], ids=["killed", "torn"])
def test_a_partial_file_is_never_read(torn: bool, tmp_path: Path, figure: Callable[[str, str], None]) -> None:
    context = multiprocessing.get_context("fork")
    read = []
    for last in range(8):
        folder = tmp_path / str(last)
        process = context.Process(target=write_until, args=(folder, last, torn))
        process.start()
        process.join()
        read.append(len(ReferenceCache(folder, "a")))
        again = ReferenceCache(folder, "a")
        again.put(KEYS)
        again.flush()
        assert ReferenceCache(folder, "a").values == KEYS
        if process.exitcode == 0:
            break
    assert process.exitcode == 0, "the last one was not killed"
    assert set(read) <= {0, len(KEYS)}
    assert read[:2] == [0, 0]
    assert read[-1] == len(KEYS)
    figure("reference cache: killed at each operation", f"{len(read) - 1} kills, 0 partial files read")


# -- the reference at step 0 ----------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(**options: Any) -> dict[str, Any]:
    return {"peft_config": peft.LoraConfig(**{**LORA, **options})}


def loaded(folder: Path) -> dict[str, Any]:
    """An adapter that was trained, saved and loaded to be trained further."""
    model = peft.get_peft_model(tiny_model(seed=1), peft.LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    return {"model": peft.PeftModel.from_pretrained(tiny_model(seed=1), folder / "adapter", is_trainable=True)}


IDENTITIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "full": lambda folder: {},
    "new LoRA": lambda folder: lora(),
    "loaded LoRA": loaded,
    "rsLoRA": lambda folder: lora(use_rslora=True),
    "DoRA": lambda folder: lora(use_dora=True),
    "modules_to_save": lambda folder: lora(modules_to_save=["lm_head"]),
}
OTHERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "init_lora_weights=False": lambda folder: lora(init_lora_weights=False),
    "PiSSA": lambda folder: lora(init_lora_weights="pissa"),
    "prompts": lambda folder: {
        "peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    },
}


@pytest.mark.parametrize("kind", [*IDENTITIES, *OTHERS])
def test_policy_and_reference_agree_at_the_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, figure: Any
) -> None:
    """What is no identity is said, and agrees all the same: the reference is what the policy starts from."""
    seen: list[tuple[Any, Any]] = []
    original = steps.check_identity
    monkeypatch.setattr(
        steps,
        "check_identity",
        lambda policy, reference, **rest: seen.append((policy, reference)) or original(policy, reference, **rest),
    )
    with caplog.at_level(logging.WARNING, "prefopt"):
        made = trainer(tmp_path, max_steps=1, count=8, **(IDENTITIES | OTHERS)[kind](tmp_path))
    assert ("is no identity before the first step" in caplog.text) == (kind in OTHERS)
    made.train()
    ((policy, reference),) = seen
    ratios = [policy[branch].sum_logps.detach() / reference[branch].sum_logps for branch in reference]
    difference = float((torch.cat(ratios) - 1).abs().max())
    assert difference < LOG_PROBS
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=LOG_PROBS)
    figure(f"reference identity: {kind}", f"log-probs equal to {difference:.0e}, loss ln 2")


@pytest.mark.parametrize("kind", IDENTITIES)
def test_a_policy_that_has_moved_is_stopped(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, count=8, rows=dataset(8), **IDENTITIES[kind](tmp_path))
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="Policy and reference differ before the first step"):
        made.train()
    assert made.state.global_step == 0
