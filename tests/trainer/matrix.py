"""Every combination of method, layout, kind of model, weights, data, reference and loss: which there are, how each is
trained, and what it must log by the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

from datasets import Dataset
from encoder_decoders import ended_tokenizer, tiny_encoder_decoder
from oracle import LEARNING_RATE, PLAIN_RUN, MakeBatch, expected_losses, padded
from peft import LoraConfig
from short_runs import TRAINERS
from tiny_models import standard_rows, tiny_model, word_tokenizer
from vision_models import PICTURES, processor_of, tiny_vision, vision_of

from prefopt.batching import encoder_decoder_batch, pad_batch
from prefopt.scoring.forward import innermost
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

LAYOUTS = ("shared_prompt", "packed", "padded")
WEIGHTS = ("full", "lora")
DATA = ("map", "stream")
REFERENCES = ("online", "precomputed")
LOSSES = ("single", "weighted")

LOSS_OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("dpo", "single"): {"loss_type": "sigmoid"},
    ("dpo", "weighted"): {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ("cpo", "single"): {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
    ("cpo", "weighted"): {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.5]},
    ("tpo", "single"): {"loss_type": "sigmoid"},
    ("tpo", "weighted"): {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
}

VISION = "qwen2_vl"


def text_rows(count: int) -> Dataset:
    return Dataset.from_dict(standard_rows(count, gold=True))


def image_rows(count: int) -> Dataset:
    """Pairs with one picture, two, or none."""
    rows = []
    for number in range(count):
        pictures = [PICTURES[(number + index) % len(PICTURES)] for index in range((1, 2, 0)[number % 3])]
        texts = {"chosen": f"A cat, {number} of them.", "rejected": "No.", "reference": "Cats."}
        turns = {column: [{"role": "assistant", "content": text}] for column, text in texts.items()}
        between = {"type": "text", "text": f"beside {number}"}
        prompt = [{"role": "user", "content": [{"type": "image", "text": None}, between] * len(pictures) or [between]}]
        rows.append({"images": pictures, "prompt": prompt, **turns})
    return Dataset.from_list(rows)


def padded_with_images(model: Any, examples: list[TokenizedExample], branches: tuple[Branch, ...]) -> PreferenceBatch:
    return pad_batch(examples, branches, vision_of(innermost(model), processor_of(VISION)))


def for_encoder_and_decoder(
    model: Any, examples: list[TokenizedExample], branches: tuple[Branch, ...]
) -> PreferenceBatch:
    return encoder_decoder_batch(examples, branches)


@dataclass(frozen=True)
class Kind:
    """A kind of model, and the layout that it is computed in."""

    model: Callable[[], Any]
    processing_class: Callable[[], Any] = word_tokenizer
    rows: Callable[[int], Dataset] = text_rows
    batch: MakeBatch = padded
    computed: Mapping[str, str] = field(default_factory=lambda: {layout: layout for layout in LAYOUTS})
    """The layout that is asked for -> the one that is taken."""
    reason: str = ""
    """Why it is another one."""


KINDS: dict[str, Kind] = {
    "dense": Kind(lambda: tiny_model("llama", seed=1)),
    "sliding window": Kind(lambda: tiny_model("olmo3", seed=1)),
    "experts": Kind(lambda: tiny_model("qwen3_moe", seed=1)),
    "recurrent": Kind(
        lambda: tiny_model("lfm2", seed=1),
        computed=dict.fromkeys(LAYOUTS, "padded"),
        reason="layers that are no plain attention",
    ),
    "vision-language": Kind(
        lambda: tiny_vision(VISION, processor_of(VISION)),
        processing_class=lambda: processor_of(VISION),
        rows=image_rows,
        batch=padded_with_images,
    ),
    "encoder-decoder": Kind(
        lambda: tiny_encoder_decoder("t5", seed=1),
        processing_class=ended_tokenizer,
        batch=for_encoder_and_decoder,
        computed=dict.fromkeys(LAYOUTS, "encoder_decoder"),
        reason="reads prompts in its encoder and writes completions in its decoder",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    method: str
    layout: str
    kind: str
    weights: str
    data: str
    reference: str
    loss: str

    def __str__(self) -> str:
        return "-".join(vars(self).values()).replace(" ", "_")


ALL = [Cell(*values) for values in product(TRAINERS, LAYOUTS, KINDS, WEIGHTS, DATA, REFERENCES, LOSSES)]
REFUSALS: dict[str, Callable[[Cell], bool]] = {
    "CPO and TPO have no reference whose log-probs could be precomputed": lambda cell: (
        cell.method != "dpo" and cell.reference == "precomputed"
    ),
}
"""Reason -> the combinations that are refused for it."""


def refusal(cell: Cell) -> str | None:
    return next((reason for reason, covers in REFUSALS.items() if covers(cell)), None)


def trainer(cell: Cell, folder: str) -> Any:
    """A trainer of two steps of SGD on the rows in their order."""
    make, config = TRAINERS[cell.method]
    kind = KINDS[cell.kind]
    rows: Any = kind.rows(PLAIN_RUN["count"])
    return make(
        kind.model(),
        args=config(
            folder,
            layout=cell.layout,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            **({"precompute_ref_log_probs": True} if cell.reference == "precomputed" else {}),
            **{name: value for name, value in PLAIN_RUN.items() if name != "count"},
            **LOSS_OPTIONS[cell.method, cell.loss],
        ),
        train_dataset=rows.to_iterable_dataset() if cell.data == "stream" else rows,
        processing_class=kind.processing_class(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if cell.weights == "lora" else None,
    )


@cache
def losses_by_definition(
    method: str, kind: str, weights: str, loss: str, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """The losses of the steps, whatever the layout, the form of the data and the way to the reference."""
    given = trainer(Cell(method, "padded", kind, weights, "map", "online", loss), "unused")
    return expected_losses(given, make_batch=KINDS[kind].batch, learning_rate=learning_rate)


def table() -> str:
    """The combinations as the documentation shows them."""
    lines = ["| model | asked for | computed as | why |", "| --- | --- | --- | --- |"]
    for name, kind in KINDS.items():
        for layout in LAYOUTS:
            taken = kind.computed[layout]
            lines.append(f"| {name} | {layout} | {taken} | {kind.reason if taken != layout else ''} |")
    lines += ["", "| refused | why |", "| --- | --- |"]
    for reason, covers in REFUSALS.items():
        lines.append(f"| {sum(map(covers, ALL))} of {len(ALL)} combinations | {reason} |")
    return "\n".join(lines) + "\n"
