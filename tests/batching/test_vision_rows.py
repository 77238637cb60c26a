"""Raw rows with images: messages, their images and tools as the processor takes them; broken rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_processors import assistant, image, one_image_rows, processor, row, text_of, user

from prefopt import DataCollatorForVisionPreference

TOOL = {"type": "function", "function": {"name": "zoom", "description": "Looks closer.", "parameters": {}}}
PART = {"type": "image"}


@pytest.mark.parametrize("written", [lambda value: value, json.dumps], ids=["objects", "json"])
def test_tools_and_template_options_reach_the_template(written: Any) -> None:
    made = processor("qwen2_vl")
    rows = one_image_rows()
    rows[0] |= {"tools": written([TOOL]), "chat_template_kwargs": written({"style": "short"})}
    rows[1] |= {"tools": [], "chat_template_kwargs": None}
    batch = DataCollatorForVisionPreference(made)(rows)
    for index in (0, 2):
        text = text_of(batch, index, made.tokenizer)
        assert text.startswith("[tools][{")
        assert '"zoom"' in text
        assert "[short]<|im_start|>user:" in text
    assert text_of(batch, 1, made.tokenizer).startswith("<|im_start|>user:")
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == "Yes, it is.<|im_end|>"


def test_images_in_the_parts_of_messages() -> None:
    """A part may hold its image; the others are filled from the column, in order."""
    made = processor("llava")
    first, second = image(), image(30, 30, 200)
    prompt = user(PART | {"image": second}, {"type": "text", "text": "or", "image": None}, PART | {"image": None})
    both = DataCollatorForVisionPreference(made)([row([first], "") | {"prompt": prompt}])
    plain = DataCollatorForVisionPreference(made)([row([second, first], "") | {"prompt": user(PART, PART)}])
    assert torch.equal(both["pixel_values"], plain["pixel_values"])
    assert text_of(both, 0, made.tokenizer).replace("<image>", "").startswith("<|im_start|>user:or<|im_end|>")


def test_images_in_any_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image().save(path)
    made = processor("llava")
    expected = DataCollatorForVisionPreference(made)([row([image()], "What?")])
    for given in (str(path), path, path.read_bytes(), {"bytes": None, "path": str(path)}):
        batch = DataCollatorForVisionPreference(made, image_roots=(str(tmp_path),))(
            [row([], "What?") | {"images": [given]}]
        )
        assert all(torch.equal(batch[key], tensor) for key, tensor in expected.items())


def test_images_go_before_the_first_user_turn() -> None:
    made = processor("mllama")
    prompt = [{"role": "system", "content": "Hm."}, *user({"type": "text", "text": "A"}), *assistant("B"), *user("C")]
    batch = DataCollatorForVisionPreference(made)([row([image(), image()], "") | {"prompt": prompt}])
    assert "system:Hm.<|im_end|><|im_start|>user:<|image|><|image|>A<|im_end|>" in text_of(batch, 0, made.tokenizer)


def test_only_the_assistant_is_trained_on() -> None:
    made = processor("llava")
    chosen = [*assistant("A cat."), *user("Sure?"), *assistant("Yes.")]
    batch = DataCollatorForVisionPreference(made)([row([image()], "What?") | {"chosen": chosen}])
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == "A cat.<|im_end|>Yes.<|im_end|>"
    assert text_of(batch, 0, made.tokenizer).endswith(
        "A cat.<|im_end|><|im_start|>user:Sure?<|im_end|>" + ("<|im_start|>assistant:Yes.<|im_end|>")
    )
    assert text_of(batch, 1, made.tokenizer, "completion_mask") == "No.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_trained_on_whole() -> None:
    made = processor("llava")
    made.chat_template = "{{ messages | length }}" + made.chat_template
    chosen = [*assistant("A."), *user("Sure?"), *assistant("Yes.")]
    batch = DataCollatorForVisionPreference(made)([row([], "What?") | {"chosen": chosen, "rejected": chosen[:2]}])
    text = "<|im_start|>user:What?<|im_end|><|im_start|>assistant:A.<|im_end|><|im_start|>user:Sure?<|im_end|>"
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == f"4{text}<|im_start|>assistant:Yes.<|im_end|>"


def test_a_prompt_that_ends_in_an_assistant_turn_is_continued() -> None:
    made = processor("llava")
    prompt = [*user("What?"), *assistant("It is")]
    rows = [row([image()], "", " a cat.", " a dog.") | {"prompt": prompt}]
    batch = DataCollatorForVisionPreference(made)(rows)
    assert text_of(batch, 0, made.tokenizer).endswith("What?<|im_end|><|im_start|>assistant:It is a cat.<|im_end|>")
    assert text_of(batch, 1, made.tokenizer, "completion_mask") == " a dog.<|im_end|>"


def test_a_continued_turn_among_several() -> None:
    made = processor("llava")
    chosen = [*assistant(" a cat."), *user("Sure?"), *assistant("Yes.")]
    change = {"prompt": [*user("What?"), *assistant("It is")], "chosen": chosen, "rejected": assistant(" a dog.")}
    batch = DataCollatorForVisionPreference(made)([row([image()], "") | change])
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == " a cat.<|im_end|>Yes.<|im_end|>"
    assert "assistant:It is a cat.<|im_end|><|im_start|>user:Sure?" in text_of(batch, 0, made.tokenizer)


def test_a_tool_call_is_not_continued() -> None:
    made = processor("llava")
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "zoom"}}]}
    batch = DataCollatorForVisionPreference(made)([row([image()], "") | {"prompt": [*user("What?"), call]}])
    end = "<|im_start|>assistant:<|im_end|><|im_start|>assistant:Yes, it is.<|im_end|>"
    assert text_of(batch, 0, made.tokenizer).endswith(end)
    assert text_of(batch, 0, made.tokenizer, "completion_mask") == "Yes, it is.<|im_end|>"


def test_text_beside_messages() -> None:
    """A text prompt is a user turn, a text completion an assistant turn."""
    made = processor("llava")
    expected = DataCollatorForVisionPreference(made)([row([image()], "What?", "A.", "B.")])
    for change in ({"prompt": "What?"}, {"chosen": "A.", "rejected": "B."}):
        batch = DataCollatorForVisionPreference(made)([row([image()], "What?", "A.", "B.") | change])
        assert all(torch.equal(batch[key], tensor) for key, tensor in expected.items())


BROKEN = {
    "no prompt": ({"prompt": None}, "'prompt': it is missing .*not split off"),
    "no completion": ({"rejected": None}, "'rejected': it is missing"),
    "too few images": ({"prompt": user(PART, PART)}, "'images': 1 images for 2 image parts"),
    "nowhere to put it": ({"prompt": assistant("Hm.")}, "'images': there is no user turn"),
    "image in a completion": ({"chosen": user(PART)}, "'images': the prompt cannot hold .*chosen: 0, rejected: 1"),
    "other images": ({"rejected_images": [image()]}, "'rejected_images': the two sides have other images"),
    "no image": ({"images": [b"text"]}, "'images': the image cannot be read"),
    "video": ({"prompt": user({"type": "video"})}, r"'prompt\[0\]': the content has a part of type 'video'"),
    "image token in a text": ({"chosen": assistant("<image>")}, "'images': the prompt cannot hold"),
    "no message": ({"chosen": [{"content": "no role"}]}, r"'chosen\[0\]': the message has no 'role'"),
    "empty": ({"prompt": []}, "'prompt': it is missing"),
    "bad tools": ({"tools": "[{"}, "'tools': the text is not JSON"),
    "bad template": ({"chat_template_kwargs": {"tokenize": 1}}, "'prompt': the chat template failed"),
    "plain without a place": (
        {"prompt": "What?", "chosen": "A.", "rejected": "B."},
        "'images': 1 images for 0 image tokens",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named(name: str) -> None:
    change, message = BROKEN[name]
    rows = [*one_image_rows(), row([image()], "Broken?") | change]
    with pytest.raises(ValueError, match=f"row 2 of the batch, column {message}"):
        DataCollatorForVisionPreference(processor("llava"))(rows)


def test_a_template_without_images_is_named() -> None:
    made = processor("llava")
    made.chat_template = made.chat_template.replace("<image>", "")
    with pytest.raises(ValueError, match=r"row 0 of the batch, column 'prompt': 1 images, but 0 image tokens"):
        DataCollatorForVisionPreference(made)(one_image_rows())
