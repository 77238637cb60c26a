"""Rows with images: every spelling, every family of processors, and what each becomes as tokens."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from batching.tiny_processors import PLACE, PhotosOnly, assistant, image, processor, row, user
from datasets import Dataset, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageChops

from prefopt.data import PrepareOptions, prepare_dataset, prepare_report, tokenized_example
from prefopt.data.cache import cache_key
from prefopt.data.images import TOKEN_KEYS, decoded_image, image_tensors, image_token, image_token_ids, stored_image
from prefopt.data.mapping import map_columns
from prefopt.types import PAIR, TRIPLE, TokenizedExample

FAMILIES = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3"]
PART = {"type": "image"}
BIG, TALL, WIDE = image(), image(30, 60, 7), image(90, 30, 50)
OTHER = image(40, 30, 33)
"""Of the size of BIG."""
ALL = PrepareOptions(PAIR, None, "keep_start", image_roots=("/", "memory://"))


def examples(rows: Any, made: Any, options: PrepareOptions = ALL) -> list[TokenizedExample]:
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    prepared = prepare_dataset(dataset, made, options, name="train")
    return [tokenized_example(item, options.branches) for item in prepared]


def same_pictures(first: Any, second: Any) -> bool:
    return len(first) == len(second) and not any(
        a.size != b.size or ImageChops.difference(a, b).getbbox() for a, b in zip(first, second, strict=True)
    )


def path_of(example: TokenizedExample, branch: Any) -> list[int]:
    return [*example.prompt_ids, *example.completion_ids[branch]]


def whole_call(made: Any, text: str, images: list[Any]) -> list[int]:
    """What the processor makes of a text with images."""
    return made(images=[images] if images else None, text=[text], add_special_tokens=False)["input_ids"][0]


def rendered(made: Any, messages: list[dict[str, Any]]) -> str:
    template = made.chat_template
    return made.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def parts(images: list[Any], text: str) -> list[dict[str, Any]]:
    return [*([PART] * len(images)), {"type": "text", "text": text}]


def trained(example: TokenizedExample, branch: Any, made: Any) -> str:
    pairs = zip(example.completion_ids[branch], example.loss_masks[branch], strict=True)
    return made.tokenizer.decode([token for token, mask in pairs if mask])


# -- what processors make of images --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tensors_are_those_of_the_whole_call(family: str) -> None:
    made = processor(family)
    images = [BIG, WIDE, TALL]
    text = "".join(f"{PLACE[family]} number {number}\n" for number in range(3))
    whole = made(images=[images], text=[text], return_tensors="pt")
    alone = image_tensors(made, images)
    assert set(alone) == set(whole) - TOKEN_KEYS
    assert "pixel_values" in alone
    for key, value in alone.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(whole[key])), key
    assert image_tensors(made, []) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_call(family: str) -> None:
    """None, one and several images of different sizes, in one set."""
    made = processor(family)
    rows = [row([BIG], "Is it light?"), row([], "Hm?"), row([WIDE, TALL, BIG], "Which?", "The second one.", "All.")]
    found = examples(rows, made)
    placeholders = image_token_ids(made)
    for given, example in zip(rows, found, strict=True):
        for branch in PAIR:
            said = given[branch][0]["content"]
            question = parts(given["images"], given["prompt"][0]["content"])
            answer = {"role": "assistant", "content": parts([], said)}
            text = rendered(made, [{"role": "user", "content": question}, answer])
            assert path_of(example, branch) == whole_call(made, text, given["images"])
            assert trained(example, branch, made) == said + "<|im_end|>"
            assert placeholders.isdisjoint(example.completion_ids[branch])
        assert same_pictures(example.images.get("prompt", []), given["images"])
        assert set(example.images) <= {"prompt"}
        assert bool(given["images"]) == (not placeholders.isdisjoint(example.prompt_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_rows_hold_the_image_token(family: str) -> None:
    made = processor(family)
    token = image_token(made)
    prompt = f"See {token} and {token}:"
    text_row = {"prompt": prompt, "chosen": " one.", "rejected": " two.", "images": [BIG, TALL]}
    [example] = examples([text_row], made)
    for branch in PAIR:
        whole = whole_call(made, prompt + text_row[branch], [BIG, TALL])
        assert path_of(example, branch) == [*whole, made.tokenizer.eos_token_id]
        assert trained(example, branch, made) == text_row[branch] + "</s>"
    assert same_pictures(example.images["prompt"], [BIG, TALL])


def test_photos_through_a_real_tokenizer(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    small = processor("qwen2_vl")
    made = PhotosOnly(small.image_processor, tokenizer, chat_template=small.chat_template)
    paths = [str(shared / "data" / "images" / f"{number}.jpg") for number in (1, 2, 3)]
    rows = [row([], "Who plays?") | {"images": paths[:1]}, row([], "Where? Hm?") | {"images": paths[1:]}]
    for given, example in zip(rows, examples(rows, made), strict=True):
        photos = [Image.open(path).convert("RGB") for path in given["images"]]
        assert same_pictures(example.images["prompt"], photos)
        grid = image_tensors(made, photos)["image_grid_thw"]
        count = sum(token == made.image_token_id for token in example.prompt_ids)
        assert count == grid.prod(1).sum() // small.image_processor.merge_size**2


# -- spellings -----------------------------------------------------------------------------------------------------


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def base64_of(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [part, {"type": "text", "text": "Is it?"}]}]}


SPELLINGS: dict[str, Any] = {
    "pictures": lambda path: {"images": [TALL]},
    "one picture": lambda path: {"image": TALL},
    "path": lambda path: {"images": [path]},
    "one path": lambda path: {"image": path},
    "bytes": lambda path: {"images": [png(TALL)]},
    "mapping with bytes": lambda path: {"images": [{"bytes": png(TALL), "path": None}]},
    "mapping with path": lambda path: {"images": [{"bytes": None, "path": path}]},
    "file URL": lambda path: {"images": [f"file://{path}"]},
    "URL": lambda path: {"images": ["memory://v1/tall.png"]},
    "data URL": lambda path: {"images": [f"data:image/png;base64,{base64_of(TALL)}"]},
    "empty column beside it": lambda path: {"images": [TALL], "image": None, "rejected_images": []},
    "place in the message": lambda path: {"images": [path], **with_part(PART)},
    "token in the message": lambda path: {"images": [path], "prompt": user("<|image_pad|>Is it?")},
    "tag in the message": lambda path: {"images": [path], "prompt": user("<image>Is it?")},
    "picture in the message": lambda path: with_part(PART | {"image": TALL}),
    "path in the message": lambda path: with_part(PART | {"path": path}),
    "base64 in the message": lambda path: with_part(PART | {"base64": base64_of(TALL)}),
    "OpenAI": lambda path: with_part({"type": "image_url", "image_url": {"url": path}}),
    "url": lambda path: with_part(PART | {"url": f"data:;base64,{base64_of(TALL)}"}),
    "both sides": lambda path: {"chosen_images": [TALL], "rejected_images": [path]},
    "the side's own in place of the shared": lambda path: {
        "images": [BIG],
        "chosen_images": [TALL],
        "rejected_image": TALL,
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_row(name: str, tmp_path: Path) -> None:
    made = processor("qwen2_vl")
    path = tmp_path / "tall.png"
    path.write_bytes(png(TALL))
    with fsspec.open("memory://v1/tall.png", "wb") as file:
        file.write(png(TALL))  # type: ignore[union-attr]
    plain = row([], "Is it?")
    del plain["images"]
    [expected] = examples([{**plain, "images": [TALL]}], made)
    stream = IterableDataset.from_generator(lambda: iter([{**plain, **SPELLINGS[name](str(path))}]))
    [found] = examples(stream, made)
    if name == "both sides":  # one is a picture and one a file, which is not known to hold the same
        assert path_of(found, "chosen") == path_of(expected, "chosen")
        assert trained(found, "rejected", made) == trained(expected, "rejected", made)
        assert same_pictures(found.images["chosen"] + found.images["rejected"], [TALL, TALL])
        return
    assert (found.prompt_ids, found.completion_ids) == (expected.prompt_ids, expected.completion_ids)
    assert found.loss_masks == expected.loss_masks
    assert same_pictures(found.images["prompt"], [TALL])


def test_arrays_and_mappings_within(tmp_path: Path) -> None:
    array = np.asarray(TALL)
    assert same_pictures([decoded_image(stored_image(array))], [TALL])
    path = tmp_path / "a.png"
    TALL.save(path)
    assert stored_image({"path": path}, [str(tmp_path)]) == {"bytes": None, "path": str(path.resolve())}


def test_pictures_are_upright_and_rgb() -> None:
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    TALL.save(buffer, "PNG", exif=exif)
    turned = decoded_image(stored_image(buffer.getvalue()))
    assert same_pictures([turned], [TALL.transpose(Image.Transpose.ROTATE_270)])
    assert same_pictures([decoded_image(stored_image(Image.open(buffer)))], [turned])
    assert decoded_image(stored_image(TALL.convert("L"))).mode == "RGB"


@pytest.mark.parametrize("feature", [None, ImageFeature()], ids=["as inferred", "as images"])
def test_columns_of_the_images_type_are_not_decoded(feature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a column, and within a message; in a set, in a stream, and in several processes."""
    made = processor("llava")
    rows = [row([BIG, TALL], "Which?"), row([], "What?"), row([WIDE], "Who?") | {"images": None}]
    rows[2]["prompt"] = user(PART | {"image": WIDE, "text": None}, {"type": "text", "text": "Who?", "image": None})
    for given in rows[:2]:
        given["prompt"] = user({"type": "text", "text": given["prompt"][0]["content"], "image": None})
    dataset = Dataset.from_list(rows)
    if feature is not None:
        dataset = dataset.cast_column("images", List(feature))
    monkeypatch.setattr(ImageFeature, "decode_example", None)
    found = examples(dataset, made)
    assert [list(map(len, example.images.values())) for example in found] == [[2], [], [1]]
    prepared = prepare_dataset(dataset, made, ALL, name="train")
    in_processes = prepare_dataset(dataset, made, PrepareOptions(PAIR, None, "keep_start", num_proc=2), name="train")
    assert in_processes[:] == prepared[:]
    monkeypatch.undo()  # the first row is read to see which columns there are
    streamed = prepare_dataset(dataset.to_iterable_dataset(), made, ALL, name="train")
    assert list(streamed) == list(prepared)
    assert prepared.features["images"] == List({"bytes": Value("binary"), "path": Value("string")})
    assert prepared["image_parts"][:] == [[0, 0], [], [0]]


def test_renamed_columns_keep_the_bytes_of_their_files() -> None:
    """A JPEG that were decoded and written anew would be another picture."""
    buffer = io.BytesIO()
    WIDE.save(buffer, "JPEG")
    given = {"photos": [{"bytes": buffer.getvalue(), "path": None}], "q": "<image>?", "good": "A.", "bad": "B."}
    dataset = Dataset.from_list([given]).cast_column("photos", List(ImageFeature()))
    columns = {"images": "photos", "prompt": "q", "chosen": "good", "rejected": "bad"}
    renamed = map_columns(dataset, columns, None)
    [found] = prepare_dataset(renamed, processor("llava"), ALL, name="train")
    assert found["images"] == given["photos"]


# -- formats -------------------------------------------------------------------------------------------------------


def test_an_implicit_prompt_holds_the_images() -> None:
    made = processor("gemma3")
    explicit = row([BIG, TALL], "Which?")
    implicit = {side: explicit["prompt"] + explicit[side] for side in PAIR} | {"images": [BIG, TALL]}
    own = [{"role": "user", "content": [PART | {"image": BIG}, PART | {"image": TALL}, *parts([], "Which?")]}]
    within = {side: own + explicit[side] for side in PAIR}
    [expected] = examples([explicit], made)
    for rows in ([implicit], IterableDataset.from_generator(lambda: iter([within]))):
        [found] = examples(rows, made)
        assert found.prompt_ids == expected.prompt_ids
        assert found.completion_ids == expected.completion_ids
        assert same_pictures(found.images["prompt"], [BIG, TALL])


def test_tags_are_places_where_there_are_as_many_as_images() -> None:
    made = processor("qwen3_vl")
    place = PLACE["qwen3_vl"]
    for question, expected in (
        ("Is <image> or <image>?", f"Is {place} or {place}?"),
        ("What is <image> in HTML?", f"{place}{place}What is <image> in HTML?"),
    ):
        [found] = examples([row([BIG, TALL], question)], made)
        opening, end = "<|im_start|>user:", "<|im_end|><|im_start|>assistant:"
        assert found.prompt_ids == whole_call(made, opening + expected + end, [BIG, TALL])


def test_questions_of_their_own_about_one_image() -> None:
    """Nothing is shared, and the image stands in the first user turn of each side."""
    made = processor("gemma3")
    rows = [{"chosen": user("A?") + assistant("B."), "rejected": user("C?") + assistant("D."), "images": [BIG]}]
    [found] = examples(rows, made)
    assert [len(found.images[branch]) for branch in PAIR] == [1, 1]
    for branch, question, answer in (("chosen", "A?", "B."), ("rejected", "C?", "D.")):
        text = rendered(made, [{"role": "user", "content": parts([BIG], question)}, *_answer(answer)])
        assert path_of(found, branch) == whole_call(made, text, [BIG])
        assert trained(found, branch, made) == answer + "<|im_end|>"


def test_an_implicit_prompt_of_text() -> None:
    made = processor("llava")
    told = {"chosen": "<image> What? A cat.", "rejected": "<image> What? A dog.", "images": [BIG]}
    [found] = examples([told], made)
    assert trained(found, "chosen", made) == " cat.</s>"
    assert path_of(found, "chosen") == [*whole_call(made, told["chosen"], [BIG]), made.tokenizer.eos_token_id]


def test_tools_and_template_options() -> None:
    made = processor("qwen3_vl")
    tool = {"type": "function", "function": {"name": "zoom", "description": "Looks closer.", "parameters": {}}}
    given = row([BIG], "Is it?") | {"tools": [tool], "chat_template_kwargs": {"style": "short"}}
    [found] = examples([given], made)
    options: dict[str, Any] = {"tools": [tool], "style": "short", "chat_template": made.chat_template}
    messages = [{"role": "user", "content": parts([BIG], "Is it?")}]
    text = made.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert "[short]" in text
    assert found.prompt_ids == whole_call(made, text, [BIG])


def test_only_the_assistant_is_trained_on() -> None:
    """A completion of several turns, one of the user's with an image of its own."""
    made = processor("idefics3")
    more = {"role": "user", "content": [PART, {"type": "text", "text": "And this?"}]}
    chosen = [*assistant("A cat."), more, *assistant("A dog.")]
    plain = [{"type": "text", "text": "No."}]
    given = {
        "prompt": user(PART, {"type": "text", "text": "What?"}),
        "chosen": [
            {**message, "content": message["content"] if message is more else parts([], message["content"])}
            for message in chosen
        ],
        "rejected": [{"role": "assistant", "content": plain}],
        "images": [BIG],
        "chosen_images": [WIDE],
    }
    [found] = examples(IterableDataset.from_generator(lambda: iter([given])), made)
    assert trained(found, "chosen", made) == "A cat.<|im_end|>A dog.<|im_end|>"
    assert same_pictures(found.images["prompt"], [BIG])
    assert same_pictures(found.images["chosen"], [WIDE])
    text = rendered(made, [*given["prompt"], *given["chosen"]])
    assert path_of(found, "chosen") == whole_call(made, text, [BIG, WIDE])


def test_an_image_that_the_assistant_gives_is_not_trained_on() -> None:
    made = processor("qwen2_5_vl")
    answer = [{"role": "assistant", "content": [*parts([], "Here: "), PART, *parts([], " as asked.")]}]
    given = row([], "Draw.") | {"chosen": answer, "chosen_images": [TALL]}
    [found] = examples(IterableDataset.from_generator(lambda: iter([given])), made)
    shown = "Here: <|vision_start|><|vision_end|> as asked.<|im_end|>"
    assert trained(found, "chosen", made) == shown
    assert set(found.images) == {"chosen"}


def test_a_prompt_that_is_continued() -> None:
    made = processor("llava")
    prompt = [*user("What?"), *assistant("It is")]
    [found] = examples([row([BIG], "", " a cat.", " a dog.") | {"prompt": prompt}], made)
    assert made.tokenizer.decode(found.prompt_ids).endswith("What?<|im_end|><|im_start|>assistant:It is")
    assert trained(found, "rejected", made) == " a dog.<|im_end|>"


def test_three_completions_and_reference_log_probs() -> None:
    made = processor("llava")
    given = row([BIG], "What?") | {
        "reference": assistant("Gold."),
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
    }
    [found] = examples([given], made, PrepareOptions(TRIPLE, None, "keep_start"))
    assert trained(found, "gold", made) == "Gold.<|im_end|>"
    assert found.ref_sum_logps == {"chosen": -1.0, "rejected": -2.0}
    assert same_pictures(found.images["prompt"], [BIG])


def test_rows_of_token_ids() -> None:
    made = processor("llava")
    [expected] = examples([row([BIG, TALL], "Which?")], made)
    ids = {
        "prompt_ids": expected.prompt_ids,
        "chosen_ids": expected.completion_ids["chosen"],
        "rejected_ids": expected.completion_ids["rejected"],
    }
    [found] = examples([ids | {"images": [BIG, TALL]}], made)
    assert found.prompt_ids == expected.prompt_ids
    assert same_pictures(found.images["prompt"], [BIG, TALL])
    [moved] = examples([ids | {"images": [BIG, TALL], "rejected_images": [BIG, OTHER]}], made)
    assert path_of(moved, "rejected") == path_of(expected, "rejected")
    assert [len(moved.images[key]) for key in ("prompt", "chosen", "rejected")] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"row 0, column 'images': 1 images of 4 tokens, but 8 image tokens"):
        examples([ids | {"images": [BIG]}], made)


# -- other images on the two sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", [OTHER, TALL], ids=["same size", "other size"])
def test_the_prompt_ends_before_the_first_image_that_differs(family: str, other: Image.Image) -> None:
    made = processor(family)
    given = row([WIDE, BIG], "Which?", "The first.", "The first.") | {"rejected_images": [WIDE, other]}
    [found] = examples([given], made)
    assert [len(found.images[key]) for key in ("prompt", "chosen", "rejected")] == [1, 1, 1]
    placeholders = image_token_ids(made)
    for branch, picture in (("chosen", BIG), ("rejected", other)):
        text = rendered(made, [{"role": "user", "content": parts([WIDE, picture], "Which?")}, *_answer("The first.")])
        assert path_of(found, branch) == whole_call(made, text, [WIDE, picture])
        assert trained(found, branch, made) == "The first.<|im_end|>"
        assert same_pictures(found.images[branch], [picture])  # type: ignore[index]
        count = [
            sum(token in placeholders for token in ids) for ids in (found.prompt_ids, found.completion_ids[branch])
        ]
        alone = [sum(token in placeholders for token in whole_call(made, PLACE[family], [p])) for p in (WIDE, picture)]
        assert count == alone


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": parts([], text)}]


def test_images_make_the_difference() -> None:
    """Sides that say the same differ in their images, or teach nothing; with and without a prompt of its own."""
    made = processor("llava")
    alike = row([BIG], "What?", "Yes.", "Yes.")
    implicit = {side: alike["prompt"] + alike[side] for side in PAIR} | {"images": [BIG]}
    for given in (alike, implicit):
        rows = Dataset.from_list([given | {"rejected_images": own} for own in ([OTHER], [], [BIG])])
        prepared = prepare_dataset(rows, made, ALL, name="train")
        assert prepare_report(prepared).skipped == {"chosen equal to rejected": [1, 2]}
        example = tokenized_example(prepared[0], PAIR)
        assert trained(example, "rejected", made) == "Yes.<|im_end|>"
        assert set(example.images) == set(PAIR)


# -- refusals and the cache ----------------------------------------------------------------------------------------

REFUSED: dict[str, Any] = {
    "too few images": ({"prompt": user(PART, PART)}, "'images': 1 images for 2 image parts"),
    "too many": ({"images": [BIG, BIG], "prompt": user(PART)}, "'images': 2 images for 1 image parts"),
    "too many of one side": (
        {"rejected_images": [BIG, BIG], "prompt": user(PART)},
        "'rejected_images': 2 images for 1",
    ),
    "other numbers": ({"rejected_images": [BIG, BIG]}, "'images': the prompt cannot hold .* .chosen: 1, rejected: 2."),
    "nowhere": ({"prompt": assistant("Hm.")}, "'images': there is no user turn to put the images in"),
    "no file": ({"images": ["/no/such/file.png"]}, "'images': the image cannot be read .FileNotFoundError"),
    "no image": ({"images": [b"text"]}, "'images': the image cannot be read .UnidentifiedImageError"),
    "a number": ({"images": [3]}, "'images': the image cannot be read .*expected an image, got int"),
    "no base64": (
        {"images": ["data:image/png;base64,?"]},
        "'images': the image cannot be read .*the data: URL is not base64",
    ),
    "in a message": ({"prompt": user(PART | {"path": "none.png"})}, r"'prompt\[0\]': the image cannot be read"),
    "video": (
        {"prompt": user({"type": "video", "video": "a.mp4"})},
        r"'prompt\[0\]': the content has a part of type 'video'",
    ),
    "text without a place": (
        {"prompt": "What?", "chosen": "A.", "rejected": "B."},
        "'images': 1 images for 0 image tokens in the text. Write '<image>'",
    ),
    "a place without an image": (
        {"images": [], "prompt": "What <image>?", "chosen": "A.", "rejected": "B."},
        "'images': 0 images for 1 image tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_row_is_named(name: str) -> None:
    change, message = REFUSED[name]
    rows = [row([BIG], "Fine."), row([BIG], "What?") | change]
    with pytest.raises(ValueError, match=rf"train data, row 1, column {message}"):
        list(examples(IterableDataset.from_generator(lambda: iter(rows)), processor("llava")))


def test_a_template_that_writes_no_images_is_named() -> None:
    made = processor("llava")
    made.chat_template = made.chat_template.replace("<image>", "")
    with pytest.raises(ValueError, match=r"row 0, column 'images': 1 images of 4 tokens, but 0 image tokens.*template"):
        examples([row([BIG], "What?")], made)


@pytest.mark.parametrize(
    ("change", "column"),
    [({}, "images"), ({"images": None, "prompt": user(PART)}, r"prompt\[0\]")],
    ids=["column", "message"],
)
def test_a_tokenizer_alone_cannot_take_images(change: dict[str, Any], column: str) -> None:
    made = processor("llava")
    text = {"prompt": "a", "chosen": "b", "rejected": "c", "images": []}
    assert len(examples([text], made.tokenizer)) == 1
    rows = [text, row([BIG], "What?") | change]
    fix = "AutoProcessor.*remove .* to train on the text"
    with pytest.raises(ValueError, match=rf"row 1, column '{column}': .*{fix}"):
        examples(IterableDataset.from_generator(lambda: iter(rows)), made.tokenizer)


def test_a_processor_without_tokens_for_images_is_named() -> None:
    with pytest.raises(ValueError, match="row 0, column 'images': MllamaProcessor puts no tokens in an image's place"):
        examples([row([BIG], "What?")], processor("mllama"))


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    BIG.save(path)
    [prepared] = prepare_dataset(
        Dataset.from_list([row([], "Hm?") | {"images": [str(path)]}]), processor("llava"), ALL, name="train"
    )
    path.unlink()
    with pytest.raises(OSError, match=r"row 0: an image that was there .*a\.png.* cannot be read"):
        tokenized_example(prepared, PAIR)


def test_the_key_of_the_cache_holds_the_settings_of_images() -> None:
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    keys = [cache_key(dataset, processor("qwen2_vl"))]
    for name, value in (("patch_size", 7), ("merge_size", 1), ("size", {"shortest_edge": 1, "longest_edge": 9})):
        made = processor("qwen2_vl")
        setattr(made.image_processor, name, value)
        keys.append(cache_key(dataset, made))
    assert len(set(keys)) == 4
    assert cache_key(dataset, processor("qwen2_vl")) == keys[0]
    longer = processor("idefics3")
    longer.image_seq_len = 5
    assert cache_key(dataset, longer) != cache_key(dataset, processor("idefics3"))
