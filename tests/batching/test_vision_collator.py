"""Pairs with images: TRL's tensors where TRL makes any, and what it refuses or drops."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_processors import PLACE, PhotosOnly, assistant, image, one_image_rows, processor, row, text_of, user

from prefopt import DataCollatorForVisionPreference

FAMILIES = ["llava", "qwen2_vl", "idefics3", "gemma3"]
TOKEN_KEYS = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")
PER_TOKEN = (*TOKEN_KEYS, "cross_attention_mask")
PART = {"type": "image"}


def mixed_rows() -> list[dict[str, Any]]:
    """No image, two of them, one."""
    several = row([image(), image(60, 30, 50)], "Which is wider?", "The second one.", "The first.")
    return [row([], "Is water wet?"), several, row([image(33, 44, 9)], "Old?")]


def plain_rows(place: str) -> list[dict[str, Any]]:
    return [
        {"images": [image()], "prompt": f"{place}What? ", "chosen": "A cat.", "rejected": "A dog, as it seems."},
        {"images": [image(50, 50, 3)], "prompt": f"Look: {place} Who is it? ", "chosen": "Ann.", "rejected": "Bo."},
        {"images": [image(20, 20, 5)], "prompt": f"What? {place}", "chosen": "A dog.", "rejected": "No."},
    ]


def part_rows() -> list[dict[str, Any]]:
    """Images where the prompt says, in a conversation of several turns with a system turn."""
    text = {"type": "text", "text": "and"}
    earlier = [*user(PART, text, PART), *assistant("Seen.")]
    prompt = [{"role": "system", "content": "Be brief."}, *earlier, *user(text, PART)]
    images = [image(), image(20, 60, 30), image(60, 20, 60)]
    return [row(images, "") | {"prompt": prompt}]


ROWS = {
    "one image": lambda place: one_image_rows(),
    "column image": lambda place: [row | {"image": row.pop("images")[0]} for row in one_image_rows()],
    "mixed": lambda place: mixed_rows(),
    "plain": plain_rows,
    "parts": lambda place: part_rows(),
    "no image": lambda place: [row([], "Is water wet?"), row([], "Why?", "So.", "Because it is.")],
}


@pytest.mark.trl
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_trls(name: str, rows: str) -> None:
    """Every tensor is TRL's; ids are compared where there is a token, as TRL's padding is 0 or the pad token."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    made = processor(name)
    theirs = trl.DataCollatorForVisionPreference(made)(ROWS[rows](PLACE[name]))
    ours = DataCollatorForVisionPreference(made)(ROWS[rows](PLACE[name]))
    assert set(ours) == set(theirs)
    assert ("pixel_values" in ours) == (rows != "no image")
    attended = ours["attention_mask"].bool()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        if key in TOKEN_KEYS:
            assert tensor.shape == attended.shape
            assert torch.equal(tensor[attended], theirs[key][attended]), key
            assert not tensor[~attended].any() or key == "input_ids"
        else:
            assert torch.equal(tensor, theirs[key]), key
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours["completion_mask"].any(1).all()


@pytest.mark.trl
def test_fields_are_trls() -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    ours, theirs = (
        [(field.name, field.default) for field in dataclasses.fields(collator)]
        for collator in (DataCollatorForVisionPreference, trl.DataCollatorForVisionPreference)
    )
    assert ours[:-1] == theirs
    assert ours[-1][0] == "image_roots"


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_left_as_they_are(name: str) -> None:
    rows = part_rows() + [row | {"image": row.pop("images")[0]} for row in one_image_rows()]
    before = copy.deepcopy(rows)
    DataCollatorForVisionPreference(processor(name))(rows)
    assert rows == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_prompt_and_completion(name: str) -> None:
    """Written out: text rows among rows with images, all chosen sequences, then all rejected ones."""
    made = processor(name)
    batch = DataCollatorForVisionPreference(made)(mixed_rows())
    rows = [(text_of(batch, i, made.tokenizer), text_of(batch, i, made.tokenizer, "completion_mask")) for i in range(6)]
    assert rows[0][0] == "<|im_start|>user:Is water wet?<|im_end|><|im_start|>assistant:Yes, it is.<|im_end|>"
    completions = ["Yes, it is.", "The second one.", "Yes, it is.", "No.", "The first.", "No."]
    assert [completion for _, completion in rows] == [f"{text}<|im_end|>" for text in completions]
    assert all(text.endswith(f"<|im_start|>assistant:{completion}") for text, completion in rows)
    tokens_of_image = batch["input_ids"] == made.image_token_ids[0]
    counts = tokens_of_image.sum(1).tolist()
    assert counts[:3] == counts[3:]
    assert counts[0] == 0
    assert counts[1] > counts[2] > 0
    assert not (tokens_of_image & batch["completion_mask"].bool()).any()


@pytest.mark.parametrize("name", [*FAMILIES, "mllama"])
def test_tensors_are_those_of_the_joint_texts(name: str) -> None:
    """The processor on prompt and completion as one text gives the same, but for what it says of padding."""
    made = processor(name)
    batch = DataCollatorForVisionPreference(made)(mixed_rows())
    rows = [(each, side) for side in ("chosen", "rejected") for each in mixed_rows()]
    texts = []
    for each, side in rows:
        turn = user(*[PART] * len(each["images"]), {"type": "text", "text": each["prompt"][0]["content"]})
        reply = [{"role": "assistant", "content": [{"type": "text", "text": each[side][0]["content"]}]}]
        texts.append(made.apply_chat_template(turn + reply))
    images = [each["images"] for each, _ in rows]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
    whole = made(images=images, text=texts, **options)
    attended = batch["attention_mask"].bool()
    assert set(whole) == set(batch) - {"completion_mask"}
    for key, tensor in whole.items():
        assert tensor.shape == batch[key].shape, key
        ours, theirs = (value[attended] if key in PER_TOKEN else value for value in (batch[key], tensor))
        assert torch.equal(ours, theirs), key


def test_images_are_processed_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = processor("llava"), []
    process = type(made.image_processor).__call__

    def counting(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(each for group in images for each in group)
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(type(made.image_processor), "__call__", counting)
    batch = DataCollatorForVisionPreference(made)(mixed_rows())
    assert len(seen) == 3
    assert batch["pixel_values"].shape[0] == 6
    assert torch.equal(batch["pixel_values"][:3], batch["pixel_values"][3:])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_width_in_multiples(name: str) -> None:
    made = processor(name)
    narrow = DataCollatorForVisionPreference(made)(mixed_rows())
    wide = DataCollatorForVisionPreference(made, pad_to_multiple_of=64)(mixed_rows())
    width = narrow["input_ids"].shape[1]
    assert width % 64
    assert set(narrow) == set(wide)
    for key in set(wide) & set(TOKEN_KEYS):
        assert wide[key].shape == (6, -(-width // 64) * 64)
        assert torch.equal(wide[key][:, :width], narrow[key])
        assert (wide[key][:, width:] == (made.tokenizer.pad_token_id if key == "input_ids" else 0)).all()
    assert torch.equal(wide["pixel_values"], narrow["pixel_values"])


@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_ends_after_the_last_image(name: str) -> None:
    """At the last token of the last image the batch is whole up to there; one token less is refused."""
    made = processor(name)
    whole = DataCollatorForVisionPreference(made)(mixed_rows())
    is_image = torch.isin(whole["input_ids"], torch.tensor(made.image_token_ids))
    end = int(is_image.nonzero()[:, 1].max()) + 1
    cut = DataCollatorForVisionPreference(made, max_length=end)(mixed_rows())
    for key in set(whole) & set(TOKEN_KEYS):
        assert torch.equal(cut[key], whole[key][:, :end]), key
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(ValueError, match=rf"row 1 of the batch.*max_length={end - 1} .*number {end}.*Set max_length"):
        DataCollatorForVisionPreference(made, max_length=end - 1)(mixed_rows())


def test_text_rows_are_cut_anywhere() -> None:
    made = processor("llava")
    rows = [row([], "Is water wet?"), row([], "Why?")]
    whole = DataCollatorForVisionPreference(made)(rows)
    cut = DataCollatorForVisionPreference(made, max_length=5)(rows)
    assert cut["input_ids"].shape == (4, 5)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :5])
    assert not cut["completion_mask"].any()


def test_cross_attention_goes_on_over_the_completion() -> None:
    """Completion tokens look at the images that the prompt's last token looks at; padding looks at none."""
    batch = DataCollatorForVisionPreference(processor("mllama"))(mixed_rows())
    mask, attended = batch["cross_attention_mask"], batch["attention_mask"].bool()
    assert mask.shape[:2] == attended.shape
    assert mask.shape[2] == 2
    assert not mask[~attended].any()
    looks = mask.any(-1)
    completion = batch["completion_mask"].bool()
    for pair, images in enumerate([0, 2, 1]):
        for index in (pair, pair + 3):
            assert (looks[index][completion[index]].sum(1) == images).all()


def test_tokens_that_merge_across_the_prompts_end_are_the_completions() -> None:
    """``c: `` + ``d`` are ``c``, ``:``, `` d``; the other side begins there too. All tokens are the joint text's."""
    made = processor("llava", merges=(("Ġ", "d"),))
    rows = [{"image": image(), "prompt": "<image>c: ", "chosen": "dog", "rejected": "cat"}]
    batch = DataCollatorForVisionPreference(made)(rows)
    pieces = made.tokenizer.convert_ids_to_tokens(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert pieces[-5:] == ["c", ":", "Ġd", "o", "g"]
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == " dog"
    assert text_of(batch, 1, made.tokenizer, "completion_mask") == " cat"
    assert text_of(batch, 1, made.tokenizer).endswith("c: cat")


def test_a_processor_that_writes_behind_the_prompt_takes_no_merged_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = processor("llava", merges=(("Ġ", "d"),))
    call = type(made).__call__
    monkeypatch.setattr(
        type(made), "__call__", lambda self, text, **more: call(self, text=[f"{t}\n" for t in text], **more)
    )
    rows = [{"image": image(), "prompt": "<image>c: ", "chosen": "cat", "rejected": "cow"}]
    batch = DataCollatorForVisionPreference(made)(rows)
    assert text_of(batch, 0, made.tokenizer).endswith("c: \ncat")
    with pytest.raises(ValueError, match="row 0 of the batch, column 'prompt': its last tokens merge"):
        DataCollatorForVisionPreference(made)([rows[0] | {"chosen": "dog"}])


def test_reference_log_probs_pass_through() -> None:
    rows = [each | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -4.0} for each in one_image_rows()]
    batch = DataCollatorForVisionPreference(processor("llava"))(rows)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -1.5]
    assert batch["ref_rejected_logps"].dtype == torch.float32


def test_a_model_that_reads_prompts_in_both_directions_is_refused() -> None:
    """PaliGemma's attention over a completion would see the tokens to come."""
    rows = [{"image": image(), "prompt": "<image>caption", "chosen": "a cat", "rejected": "a dog"}]
    with pytest.raises(ValueError, match="PaliGemmaProcessor is made for models that read a prompt in both directions"):
        DataCollatorForVisionPreference(processor("paligemma"))(rows)


def test_photos_through_the_qwen2_tokenizer(shared: Path) -> None:
    """Real photos and a real tokenizer: every image token has its patches, and the text reads as it was written."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    made = processor("qwen2_vl")
    made = PhotosOnly(made.image_processor, tokenizer, chat_template=made.chat_template)
    photos = [Image.open(shared / "data" / "images" / f"{number}.jpg") for number in (1, 2, 3)]
    rows = [row(photos[:1], "Who plays?", "Two people."), row(photos[1:], "Where?", "At home, I think.", "Here.")]
    batch = DataCollatorForVisionPreference(made, pad_to_multiple_of=8)(rows)
    assert batch["image_grid_thw"].shape == (6, 3)
    assert batch["pixel_values"].shape[0] == batch["image_grid_thw"].prod(1).sum()
    merged = batch["image_grid_thw"].prod(1) // made.image_processor.merge_size**2
    counts = (batch["input_ids"] == made.image_token_id).sum(1)
    assert counts.tolist() == [merged[0], merged[1] + merged[2]] * 2
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == made.image_token_id)
    assert [text_of(batch, i, tokenizer, "completion_mask") for i in (1, 2)] == [
        "At home, I think.<|im_end|>",
        "No.<|im_end|>",
    ]


def test_bos_of_the_tokenizer_is_not_added() -> None:
    from tokenizers import processors as post

    made = processor("llava")
    start = made.tokenizer.bos_token_id
    made.tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert made.tokenizer("a")["input_ids"][0] == start
    batch = DataCollatorForVisionPreference(made)(one_image_rows())
    assert not (batch["input_ids"] == start).any()
