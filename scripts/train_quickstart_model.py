"""Trains the quickstart's tokenizer and model from scratch, on text that the package generates.

    python scripts/train_quickstart_model.py            writes src/prefopt/quickstart/assets
    python scripts/train_quickstart_model.py --check    trains again and compares with what is committed

Plain next-token training with a loop of its own, on the answers: the model learns to answer every request in both ways,
each with chance 1/2, whatever the request says (both answers to a request are in the same batch). Held-out sets of
animals never occur. It takes three minutes on one core.

One thread, fixed seed and AVX2 kernels: the same files, bit for bit, with the same torch on the same kind of processor.
Elsewhere rounding may differ, and grows with the steps: `--check` says by how much. The tokenizer and the configuration
are equal everywhere.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before torch is imported: kernels that do not depend on which newer instructions this processor has.
    os.environ |= {
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "1",
    }

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.quickstart.task import requests

ASSETS = Path(__file__).resolve().parents[1] / "src" / "prefopt" / "quickstart" / "assets"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MODEL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; `batch_size` counts requests, each with both answers."""

    num_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    vocab_size: int = 544
    seed: int = 0


def answered(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer): each request twice in a row, with its two answers."""
    for request in requests("train", seed):
        yield request.prompt, request.right
        yield request.prompt, request.wrong


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that every text can be encoded; the task's words become one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (prompt + answer for prompt, answer in islice(answered(recipe.seed), 20_000))
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama-shaped model with tied embeddings and random weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **MODEL,
    )
    return LlamaForCausalLM(config).train()


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: ids [2 * batch_size, longest], and labels, which are -100 on prompts and on padding (right)."""
    stream = answered(recipe.seed)
    while True:
        prompts, answers = zip(*islice(stream, 2 * recipe.batch_size), strict=True)
        prompt_ids = tokenizer(list(prompts))["input_ids"]
        answer_ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        pairs = [(start, [*rest, tokenizer.eos_token_id]) for start, rest in zip(prompt_ids, answer_ids, strict=True)]
        longest = max(len(start) + len(rest) for start, rest in pairs)
        ids = [_filled(start + rest, longest, tokenizer.pad_token_id) for start, rest in pairs]
        labels = [_filled([-100] * len(start) + rest, longest, -100) for start, rest in pairs]
        yield torch.tensor(ids), torch.tensor(labels)


def _filled(ids: list[int], length: int, filler: int) -> list[int]:
    return ids + [filler] * (length - len(ids))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    progress = max(0.0, (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * (1 + math.cos(math.pi * progress)) / 2


def train_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Next-token cross-entropy over the answers' tokens, AdamW."""
    model = new_model(tokenizer, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, recipe), recipe.num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.num_steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def build(folder: Path, recipe: Recipe) -> None:
    """Trains everything and writes the model folder."""
    tokenizer = train_tokenizer(recipe)
    model = train_model(tokenizer, recipe)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer.save_pretrained(folder)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}, written to {folder}"
    )


def differences(new: Path, committed: Path) -> list[str]:
    """What differs between two model folders, a line each; empty when they are the same, bit for bit."""
    names = sorted(path.name for path in committed.glob("*.json"))
    found = [f"{name}: differs" for name in names if _content(new / name) != _content(committed / name)]
    one, other = (load_file(folder / "model.safetensors") for folder in (new, committed))
    if one.keys() != other.keys():
        return [*found, "model.safetensors: other tensors"]
    gaps = {name: (one[name] - other[name]).abs().max().item() for name in one}
    return found + [f"model.safetensors: {name}: largest difference {gap:.2e}" for name, gap in gaps.items() if gap]


def _content(path: Path) -> dict[str, object]:
    """A JSON file without the version of transformers, which it also records."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "transformers_version"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing them")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="the model folder")
    parser.add_argument("--num_steps", type=int, default=Recipe.num_steps, help="fewer for a trial")
    options = parser.parse_args()
    recipe = Recipe(num_steps=options.num_steps)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not options.check:
        build(options.folder, recipe)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), recipe)
        found = differences(Path(folder), options.folder)
    print("\n".join(found) or "the same, bit for bit")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
