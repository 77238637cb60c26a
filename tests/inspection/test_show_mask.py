"""What `show` calls trained is what the trainer's batches score, token by token: real tokenizers, many templates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from inspection.show_batches import in_batches, in_previews
from inspection.show_templates import TEMPLATES, WITHOUT_SYSTEM
from short_runs import TRAINERS, trainer
from tiny_models import conversational_rows, tiny_model
from transformers import AutoTokenizer

from prefopt.inspection.preview.rows import preview_rows
from prefopt.inspection.preview.text import decoded
from prefopt.trainer.rows import prepare_options

TOKENIZERS = {"qwen2": "tokenizers/qwen2", "stories260K": "models/stories260K"}
LONGEST = {"qwen2": 44, "stories260K": 110}
"""Of which some rows are cut, and some are not."""
ROWS = 8
WORDS = [
    "The cat",
    " sat",
    "on the mat.",
    "\n\n",
    "caf\u00e9",
    "\u4f60\u597d\uff0c",
    "\U0001f469\u200d\U0001f680",
    "x=1;",
    "  ",
    "",
]
TOOL = '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]'


@pytest.fixture(scope="module")
def trainers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """A trainer for each tokenizer, method and way to cut; its batches are padded: rows of prompt and completion."""
    made: dict[tuple[str, str, str], Any] = {}
    first = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c", "reference": " d"}])
    for name, folder in TOKENIZERS.items():
        for method in ("dpo", "tpo"):
            tokenizer = AutoTokenizer.from_pretrained(shared / folder)
            model = tiny_model(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1)
            for mode in ("keep_start", "keep_end"):
                kind, config = TRAINERS[method]
                options: Any = {"max_length": LONGEST[name], "truncation_mode": mode, "layout": "padded"}
                quiet = {"report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
                args = config(str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=4, **options, **quiet)
                run = kind(model, args=args, train_dataset=first, processing_class=tokenizer)
                made[name, method, mode] = run
    return made


def conversation(rng: random.Random, *, with_system: bool) -> dict[str, Any]:
    """A row with one or several turns on each side, some of them empty."""

    def said(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(rng.choices(WORDS, k=rng.randint(0, 5)))}

    prompt = [said("system")] if with_system and rng.random() < 0.4 else []
    for _ in range(rng.randint(0, 1)):
        prompt += [said("user"), said("assistant")]
    prompt.append(said("user"))

    def completion() -> list[dict[str, str]]:
        turns = [said("assistant")]
        for _ in range(rng.choice([0, 0, 1])):
            turns += [said("user"), said("assistant")]
        return turns

    sides = {side: completion() for side in ("chosen", "rejected", "reference")}
    return {"prompt": prompt, **sides, "tools": TOOL if rng.random() < 0.4 else None}


@pytest.mark.parametrize("method", ["dpo", "tpo"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_mask_is_the_trainers(template: str, name: str, method: str, trainers: Any) -> None:
    seed = [*TEMPLATES].index(template)
    rng = random.Random(seed)
    rows = [conversation(rng, with_system=template not in WITHOUT_SYSTEM) for _ in range(ROWS)]
    # Both ways to cut come with both methods and both tokenizers, in turns
    mode = ("keep_start", "keep_end")[(seed + (name == "qwen2") + (method == "dpo")) % 2]
    run = trainers[name, method, mode]
    tokenizer = run.processing_class
    tokenizer.chat_template = TEMPLATES[template]
    dataset = Dataset.from_list(rows)
    run.train_dataset = run.prepared(dataset, "train")
    options = prepare_options(run.args, run.preference.branches, run.model.config)
    previews = preview_rows(dataset, range(ROWS), tokenizer, options, name="train")
    trained = in_batches(run)
    assert trained, "every row was left out: this test would compare nothing"
    assert in_previews(previews) == trained
    for preview in previews:
        for sequences in preview.branches.values():
            pieces = [*sequences.prompt, *sequences.completion]
            ids = [index for piece in pieces for index in piece.ids]
            assert "".join(piece.text for piece in pieces) == decoded(ids, tokenizer)


def test_the_targets_of_shared_prompts_are_the_trained_tokens(tmp_path: Path) -> None:
    """The layout that runs have where they do not say otherwise; its batches show targets, sequence after sequence."""
    rows = Dataset.from_dict(conversational_rows(12, gold=True))
    run = trainer(tmp_path, "tpo", rows=rows, max_length=14, truncation_mode="keep_end")
    assert run.layout.layout == "shared_prompt"
    found: dict[tuple[int, str], list[int]] = {}
    for step in run.get_train_dataloader():
        for batch in step.micro_batches:
            targets = iter(batch.targets.split(list(batch.layout.lengths)))
            for branch in batch.layout.branches:
                found |= {(row, branch): next(targets).tolist() for row in batch.rows}
    shown = in_previews(preview_rows(rows, range(12), run.processing_class, run.prepare_options, name="train"))
    assert shown.keys() == found.keys()
    for key, (ids, trained) in shown.items():
        assert [index for index, is_trained in zip(ids, trained, strict=True) if is_trained] == found[key]


def test_the_rows_have_what_the_test_is_for(trainers: Any) -> None:
    """Over all templates together some tokens are cut on each side, some are masked, and some rows left out."""
    seen: set[str] = set()
    for template in ("chatml", "marked", "earlier thoughts left out"):
        rng = random.Random([*TEMPLATES].index(template))
        dataset = Dataset.from_list([conversation(rng, with_system=True) for _ in range(3 * ROWS)])
        for mode in ("keep_start", "keep_end"):
            run = trainers["qwen2", "tpo", mode]
            run.processing_class.chat_template = TEMPLATES[template]
            for preview in preview_rows(
                dataset, range(len(dataset)), run.processing_class, run.prepare_options, name="train"
            ):
                seen |= {"skipped"} if preview.skipped else set()
                seen |= {"rewritten"} if preview.is_rewritten else set()
                for sequences in () if preview.skipped else preview.branches.values():
                    seen |= {f"prompt {piece.kind}" for piece in sequences.prompt}
                    seen |= {f"completion {piece.kind}" for piece in sequences.completion}
    kinds = {"prompt prompt", "prompt cut", "completion trained", "completion untrained", "completion cut"}
    assert seen == {"skipped", "rewritten", *kinds}
