"""Training on pairs with images: every trainer, layout and option gives the numbers of the padded run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from short_runs import TRAINERS, UNSET, log_rows, relative_difference, weights
from tiny_models import tiny_model
from vision_models import PICTURES, examples, processor_of, tiny_vision, vision_of

from prefopt import DataCollatorForVisionPreference
from prefopt.batching import share_batch
from prefopt.reference import row_keys
from prefopt.reference.policy import ModelReference
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import score
from prefopt.scoring.head.plan import uncached
from prefopt.trainer.loader import StepStream
from prefopt.trainer.memory import ActivationModel, BatchSize
from prefopt.trainer.trials import kept_bytes, run_trials
from prefopt.types import PAIR

SAME = 1e-4
"""Relative norm of weights after two steps of Adam, which divides small gradients by themselves."""
SAME_LOSS = 1e-5
"""Relative, float32."""


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return [{"role": "user", "content": content}]


def assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def rows() -> Dataset:
    """Six pairs: one image, two, none; each with a gold completion."""
    made = []
    for number in range(6):
        pictures = [PICTURES[(number + index) % len(PICTURES)] for index in range((1, 2, 0)[number % 3])]
        made.append(
            {
                "images": pictures,
                "prompt": user(*[None, "beside"] * len(pictures), f"What is number {number}?"),
                "chosen": assistant(f"A cat, {number} of them."),
                "rejected": assistant("No."),
                "reference": assistant("Cats."),
            }
        )
    return Dataset.from_list(made)


def trainer(folder: Path, method: str = "dpo", *, family: str = "qwen2_vl", model: Any = None, **options: Any) -> Any:
    """A trainer of a tiny model on all rows, two to a step."""
    make, config = TRAINERS[method]
    made = processor_of(family)
    options = {
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "use_cpu": True,
        **options,
    }
    options = {name: value for name, value in options.items() if value is not UNSET}
    names = ("eval_dataset", "data_collator", "peft_config", "processing_class")
    arguments = {name: options.pop(name) for name in names if name in options}
    data = options.pop("rows", None)
    return make(
        model or tiny_vision(family, made),
        args=config(str(folder), **options),
        train_dataset=rows() if data is None else data,
        **{"processing_class": made, **arguments},
    )


def run(folder: Path, *args: Any, **options: Any) -> Any:
    made = trainer(folder, *args, **options)
    made.train()
    return made


def losses(made: Any) -> list[float]:
    return [row["loss"] for row in log_rows(made) if "loss" in row]


def same(ours: Any, theirs: Any) -> bool:
    return relative_difference(weights(ours.model), weights(theirs.model)) < SAME and losses(ours) == pytest.approx(
        losses(theirs), rel=SAME_LOSS
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [("qwen2_vl", "dpo"), ("gemma3", "cpo"), ("qwen3_vl", "tpo"), ("idefics3", "dpo"), ("llava", "tpo")],
)
def test_layouts_train_alike(family: str, method: str, tmp_path: Path) -> None:
    shared, packed, padded = (
        run(tmp_path / layout, method, family=family, layout=layout) for layout in ("auto", "packed", "padded")
    )
    assert [made.layout.layout for made in (shared, packed, padded)] == ["shared_prompt", "packed", "padded"]
    assert same(shared, padded)
    assert same(packed, padded)


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "tokens": {"tokens_per_batch": 150},
    "worker": {"dataloader_num_workers": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing by memory": {"gradient_checkpointing": UNSET},
    "multiple": {"layout": "padded", "pad_to_multiple_of": 16},
    "precomputed": {"precompute_ref_log_probs": True},
}


def test_options_change_no_number(tmp_path: Path) -> None:
    expected = run(tmp_path / "plain")
    for name, options in OPTIONS.items():
        assert same(run(tmp_path / name, **options), expected), name
    taken = run(tmp_path / "collator", data_collator=DataCollatorForVisionPreference(processor_of("qwen2_vl")))
    assert taken.layout.layout == "shared_prompt"
    assert same(taken, expected)


def test_a_collator_with_another_length_is_refused(tmp_path: Path) -> None:
    collator = DataCollatorForVisionPreference(processor_of("qwen2_vl"), max_length=77)
    with pytest.raises(ValueError, match=r"max_length=77 .* set it in the config"):
        trainer(tmp_path, data_collator=collator)


def test_a_stream_trains_like_its_set(tmp_path: Path) -> None:
    sequential = {"train_sampling_strategy": "sequential"}
    stream = rows().to_iterable_dataset()
    assert same(run(tmp_path / "stream", rows=stream, **sequential), run(tmp_path / "set", **sequential))


@pytest.mark.parametrize("part", ["language", "both"])
def test_adapters_train_alike_in_every_layout(part: str, tmp_path: Path) -> None:
    """LoRA on the language model, and on what encodes images too."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", *(["qkv"] if part == "both" else [])])
    shared, padded = (run(tmp_path / layout, layout=layout, peft_config=lora) for layout in ("auto", "padded"))
    assert shared.layout.layout == "shared_prompt"
    assert same(shared, padded)
    moved = {name for name, weight in shared.model.named_parameters() if "lora_B" in name and weight.abs().max() > 0}
    assert any("visual" in name for name in moved) == (part == "both")


def test_a_frozen_encoder_stays(tmp_path: Path) -> None:
    model = tiny_vision("llava", processor_of("llava"))
    model.base_model.vision_tower.requires_grad_(False)
    before = weights(model.base_model.vision_tower)
    trained = run(tmp_path, family="llava", model=model, gradient_checkpointing=True)
    assert torch.equal(weights(trained.model.base_model.vision_tower), before)
    assert trained.layout.layout == "shared_prompt"


def test_metrics_of_an_evaluation_do_not_depend_on_its_batches(tmp_path: Path) -> None:
    found = []
    for size in (1, 4, 6):
        made = trainer(tmp_path / str(size), eval_dataset=rows(), per_device_eval_batch_size=size)
        metrics = made.evaluate().items()
        found.append([value for name, value in sorted(metrics) if "runtime" not in name and "per_second" not in name])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_text_alone_trains_a_model_that_could_see(tmp_path: Path) -> None:
    """Rows without a column of images, and with an empty one."""
    text = rows().select([2, 5])
    runs = [run(tmp_path / name, rows=own) for name, own in (("a", text), ("b", text.remove_columns("images")))]
    assert all(own.layout.layout == "shared_prompt" for own in runs)
    assert same(*runs)


def test_images_for_a_text_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM takes none\. Use a vision-language model"):
        trainer(tmp_path, model=tiny_model(vocab_size=320, max_position_embeddings=512))


def test_a_row_is_known_by_what_its_images_show(tmp_path: Path) -> None:
    """Bytes or a path: one key for one picture; another picture with as many tokens has another."""
    (tmp_path / "picture").write_bytes(b"one")
    images = [{"bytes": b"one", "path": None}, {"bytes": None, "path": str(tmp_path / "picture")}]
    images += [{"bytes": b"two", "path": None}]
    keys = row_keys([{"prompt_ids": [1], "images": [image]} for image in images])
    assert keys[0] == keys[1] != keys[2]


def test_a_reference_that_remembers_is_asked_once(
    tmp_path: Path, reference_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch asks for nothing; a run with other settings of the image processor asks anew."""
    asked: list[Any] = []
    original = ModelReference.__call__
    monkeypatch.setattr(
        ModelReference, "__call__", lambda self, batch: asked.append(batch.rows) or original(self, batch)
    )
    first = run(tmp_path / "first", max_steps=6)
    assert len(asked) == 3
    again = run(tmp_path / "again", max_steps=6)
    assert len(asked) == 3
    assert losses(again) == pytest.approx(losses(first), rel=SAME_LOSS)
    brighter = processor_of("qwen2_vl")
    brighter.image_processor.image_mean = [0.1, 0.1, 0.1]
    run(tmp_path / "brighter", processing_class=brighter)
    assert len(asked) == 6


def test_a_model_is_loaded_by_name_with_the_part_that_sees(tmp_path: Path) -> None:
    made = processor_of("llava")
    tiny_vision("llava", made).save_pretrained(tmp_path / "model")
    loaded = trainer(tmp_path, family="llava", model=str(tmp_path / "model")).model
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"


def test_mixed_rows_are_refused_where_weights_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    made.is_fsdp_enabled = True
    monkeypatch.setattr(type(made.args), "world_size", 2)
    for sees in (True, False):
        made.check_images(made.train_dataset.filter(lambda row, sees=sees: bool(row["images"]) == sees))
    with pytest.raises(ValueError, match=r"4 of 6 rows have images\. Under FSDP"):
        made.check_images(made.train_dataset)
    refuse = made.check_images(made.train_dataset.to_iterable_dataset())
    refuse([row for row in made.train_dataset if row["images"]])
    refuse([row for row in made.train_dataset if not row["images"]])
    stream = StepStream(made.train_dataset, made.collate(), made.geometry(1), endless=False, check=refuse)
    with pytest.raises(ValueError, match=r"1 of 2 rows have images\. Under FSDP"):
        list(stream)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_memory_of_the_encoder_is_counted(frozen: bool) -> None:
    """What autograd keeps of a pair with its images is about what its tokens alone, and in proportion, are said to."""
    made = processor_of("llava")
    model = tiny_vision("llava", made)
    model.base_model.vision_tower.requires_grad_(not frozen)
    model.base_model.multi_modal_projector.requires_grad_(not frozen)
    vision, [pair] = vision_of(model, made), examples(made, "llava", [2])
    trials = run_trials(model, pair, PAIR, "shared_prompt", precision=torch.enable_grad, vision=vision)
    assert trials.reaches_all == frozen  # as of a step that has no image
    batch = share_batch([pair, pair], PAIR, vision)
    known = [*model.parameters(), *model.buffers(), *batch.model_inputs.values(), batch.predict_from, batch.targets]
    with segment_attention(model), uncached():
        kept, _ = kept_bytes(lambda: score(model, batch).tokens.logps.sum(), known)
    size = batch.model_inputs["input_ids"].numel()
    estimate = ActivationModel.fit(trials.counts).bytes(BatchSize(size, size // 2))
    assert 0.9 * kept < estimate < 1.2 * kept
