"""What `show` calls trained is what the batches score, of models beside plain language models: images, decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from encoder_decoders import ended_tokenizer, tiny_encoder_decoder
from inspection.show_batches import Tokens, in_batches, in_previews
from short_runs import TRAINERS
from tiny_models import conversational_rows, standard_rows
from vision_models import PICTURES, processor_of, tiny_vision

from prefopt.batching.encoder_decoder import NO_TOKEN
from prefopt.inspection.preview.rows import preview_rows

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "max_steps": 1}
ROWS = 8


def previews_of(run: Any, dataset: Dataset) -> Any:
    return preview_rows(dataset, range(len(dataset)), run.processing_class, run.prepare_options, name="train")


def of_decoders(run: Any) -> tuple[dict[tuple[int, str], Tokens], dict[int, list[int]]]:
    """Completions with their targets, and prompts, from the batches of an encoder-decoder model."""
    found: dict[tuple[int, str], Tokens] = {}
    prompts: dict[int, list[int]] = {}
    for step in run.get_train_dataloader():
        for batch in step.micro_batches:
            labels, inputs = batch.model_inputs["labels"], batch.model_inputs
            targets = {*batch.predict_from.tolist()}
            for place, branch in enumerate(batch.layout.branches):
                for pair, row in enumerate(batch.rows):
                    sequence = place * batch.layout.num_pairs + pair
                    ids = [index for index in labels[sequence].tolist() if index != NO_TOKEN]
                    start = sequence * labels.shape[1]
                    found[row, branch] = ids, [start + place in targets for place in range(len(ids))]
                    prompts[row] = inputs["input_ids"][pair][inputs["attention_mask"][pair].bool()].tolist()
    return found, prompts


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_encoders_and_decoders(kind: str, mode: str, is_chat: bool, tmp_path: Path) -> None:
    make, config = TRAINERS["tpo"]
    dataset = Dataset.from_dict((conversational_rows if is_chat else standard_rows)(ROWS, gold=True))
    tokenizer = ended_tokenizer(with_bos=kind == "bart")
    tokenizer.pad_token = "<unk>"
    limits = {"max_length": 7, "max_completion_length": 6, "truncation_mode": mode}
    args = config(str(tmp_path), per_device_train_batch_size=4, **limits, **QUIET)
    run = make(tiny_encoder_decoder(kind), args=args, train_dataset=dataset, processing_class=tokenizer)
    previews = previews_of(run, dataset)
    completions, prompts = of_decoders(run)
    assert len(prompts) == ROWS
    for preview in previews:
        for branch, sequences in preview.branches.items():
            kept = [piece for piece in sequences.completion if piece.kind != "cut"]
            ids = [index for piece in kept for index in piece.ids]
            assert (ids, [piece.kind == "trained" for piece in kept for _ in piece.ids]) == completions[
                preview.row, branch
            ]
            prompt = [index for piece in sequences.prompt if piece.kind == "prompt" for index in piece.ids]
            assert prompt == prompts[preview.row]
    kinds = {piece.kind for preview in previews for piece in preview.branches["chosen"].prompt}
    assert kinds == {"prompt", "cut"}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_images(family: str, mode: str, tmp_path: Path) -> None:
    make, config = TRAINERS["dpo"]
    made = processor_of(family)

    def turn(role: str, text: str, images: int = 0) -> list[dict[str, Any]]:
        return [
            {
                "role": role,
                "content": [
                    *[{"type": "image"}, {"type": "text", "text": "and"}] * images,
                    {"type": "text", "text": text},
                ],
            }
        ]

    rows = [
        {
            "images": [PICTURES[number % len(PICTURES)]] * (number % 3),
            "prompt": turn("user", f"What is number {number}?" + " And then?" * number, number % 3),
            "chosen": turn("assistant", f"A cat, {number} of them."),
            "rejected": turn("assistant", "No."),
        }
        for number in range(ROWS)
    ]
    dataset = Dataset.from_list(rows)
    args = config(str(tmp_path), layout="padded", max_length=120, truncation_mode=mode, **QUIET)
    run = make(tiny_vision(family, made), args=args, train_dataset=dataset, processing_class=made)
    previews = previews_of(run, dataset)
    trained = in_batches(run)
    assert trained
    assert in_previews(previews) == trained
    pieces = [piece for preview in previews for piece in preview.branches["chosen"].prompt]
    assert any(piece.is_image for piece in pieces)
    assert any(piece.kind == "cut" for preview in previews for piece in preview.branches["chosen"].completion) or any(
        piece.kind == "cut" for piece in pieces
    )
