"""What the benchmarks train on: a model of a published shape with random weights, and real preference rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

VOCABULARY = 16_000


@dataclass(frozen=True)
class Shape:
    """A Qwen3-shaped decoder with tied embeddings."""

    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 64
    intermediate_size: int = 1152
    vocab_size: int = VOCABULARY

    @property
    def body_parameters(self) -> int:
        """Parameters of the matrices in the layers."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def flops_per_attended(self) -> int:
        """Forward FLOPs of one (query, key) pair through all layers."""
        return 4 * self.num_attention_heads * self.head_dim * self.num_hidden_layers


SMALL = Shape()
SHAPES = {"small": SMALL, "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936)}


def useful_flops(shape: Shape, prompt: int, completions: list[int], *, reference: bool) -> float:
    """FLOPs that one pair needs: every token once, the head on completion tokens alone, nothing computed twice."""
    attended = prompt**2 / 2 + sum(prompt * length + length**2 / 2 for length in completions)
    body = 2 * shape.body_parameters * (prompt + sum(completions))
    head = 2 * shape.head_parameters * sum(completions)
    attention = shape.flops_per_attended * attended
    return (3 + reference) * (body + head) + (3.5 + reference) * attention


def make_model(shape: Shape, *, seed: int = 0, dtype: str = "float32", device: str = "cpu", **changes: Any) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {**asdict(shape), "max_position_embeddings": 4096, "tie_word_embeddings": True, **changes}
    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(Qwen3Config(**options), dtype=getattr(torch, dtype))


def make_tokenizer(folder: Path, texts: Iterator[str], vocab_size: int = VOCABULARY) -> str:
    """A byte-level BPE tokenizer trained on the texts, saved to ``folder``; its path."""
    if not (folder / "tokenizer.json").is_file():
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        bpe = ByteLevelBPETokenizer()
        special = ["<|endoftext|>", "<|pad|>"]
        bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=special[0], pad_token=special[1])
        fast.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Workload:
    """Rows of one kind, and how they are trained on."""

    name: str
    method: str = "dpo"
    rows: str = "ultrafeedback"
    """``ultrafeedback``: as they are; ``prompt_heavy``: about 800 and 170 tokens; ``equal``: 64 and 448 tokens exactly;
    ``no_prompt``: one token of prompt."""
    options: tuple[tuple[str, Any], ...] = ()
    max_length: int = 1024
    pairs_per_step: int = 4

    def with_options(self, **options: Any) -> Workload:
        return replace(self, options=(*self.options, *options.items()))


SIMPO = (("loss_type", "simpo"), ("cpo_alpha", 0.0), ("beta", 2.0), ("simpo_gamma", 1.0))
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("dpo"),
        Workload("simpo", "cpo", options=SIMPO),
        Workload("tpo", "tpo"),
        Workload("prompt_heavy", rows="prompt_heavy"),
        Workload("equal_lengths", rows="equal"),
        Workload("no_prompt", rows="no_prompt"),
        Workload("batch_of_one", pairs_per_step=1),
    )
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of prompt, chosen, rejected with two different, filled sides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keep = ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in keep} for row in rows]
    return [row for row in rows if all(row.values()) and row["chosen"] != row["rejected"]]


def make_rows(workload: Workload, path: Path, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """``count`` rows of text of the workload's kind, made of those in ``path``; a gold completion for TPO."""
    rows = read_rows(path)
    texts = [text for row in rows for text in (row["prompt"], row["chosen"], row["rejected"])]
    if workload.rows != "ultrafeedback":
        prompt, completion = {"prompt_heavy": (800, 170), "equal": (64, 448), "no_prompt": (1, 450)}[workload.rows]
        spread = 0 if workload.rows == "equal" else 0.25
        rows = [
            {
                "prompt": stretch(texts, 3 * index, lengths(prompt, spread, 3 * index), tokenizer),
                "chosen": stretch(texts, 3 * index + 1, lengths(completion, spread, 3 * index + 1), tokenizer),
                "rejected": stretch(texts, 3 * index + 2, lengths(completion, spread, 3 * index + 2), tokenizer),
            }
            for index in range(count)
        ]
    rows = [row for row in rows if fits(row, tokenizer, workload.max_length)][:count]
    if workload.method == "tpo":
        rows = [{**row, "reference": other["chosen"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    return rows


def fits(row: dict[str, str], tokenizer: Any, max_length: int) -> bool:
    """Whether truncation leaves something of both completions: TRL trains on nothing but NaN where it does not."""
    return len(tokenizer(row["prompt"])["input_ids"]) < max_length - 8


def lengths(mean: int, spread: float, index: int) -> int:
    """A length around ``mean``, between 1 - spread and 1 + spread of it, the same for the same index."""
    return max(1, round(mean * (1 + spread * (2 * ((index * 0.6180339887) % 1) - 1))))


def stretch(texts: list[str], index: int, num_tokens: int, tokenizer: Any) -> str:
    """Text of ``num_tokens`` tokens, from the texts at ``index`` on."""
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += tokenizer(texts[index % len(texts)])["input_ids"]
        index += 7
    return tokenizer.decode(ids[:num_tokens])


def describe_lengths(rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Median and largest tokens of prompt and completions, after truncation."""
    counts: dict[str, list[int]] = {column: [] for column in rows[0]}
    for row in rows:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        for column in counts:
            own = len(tokenizer(row[column])["input_ids"]) + (column != "prompt")
            counts[column].append(own if column == "prompt" else min(own, max_length - prompt))
    return {column: {"median": statistics.median(own), "max": max(own)} for column, own in counts.items()}
