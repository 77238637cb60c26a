"""Processors of real vision-language models with tiny images and one token per byte, built without a download."""

from __future__ import annotations

from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    MllamaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% if style is defined %}[{{ style }}]{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)

PLACE = {
    "llava": "<image>",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<boi>",
    "mllama": "<|image|>",
    "paligemma": "<image>",
}
"""Processor -> what stands for one image in its text."""


class WithoutVideos:
    """A processor without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class PhotosOnly(WithoutVideos, Qwen2VLProcessor):
    pass


class PhotosOnly25(WithoutVideos, Qwen2_5_VLProcessor):
    pass


class PhotosOnly3(WithoutVideos, Qwen3VLProcessor):
    pass


class SmolPhotosOnly(WithoutVideos, SmolVLMProcessor):
    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, video_processor=None, **options)


QWEN = {"qwen2_vl": PhotosOnly, "qwen2_5_vl": PhotosOnly25, "qwen3_vl": PhotosOnly3}
# What SmolVLM writes of a video, and never of an image; the package may not be there
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def byte_tokenizer(*special: str, merges: tuple[tuple[str, str], ...] = (), **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, but for ``merges`` and special tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named or ["<|im_start|>", "<|im_end|>", *special],
    )


def processor(name: str, **tokenizer_options: Any) -> Any:
    """The processor of the model family ``name``; an image becomes a handful of tokens."""
    template = TEMPLATE.replace("IMAGE", PLACE[name])
    square = {"height": 14, "width": 14}
    if name == "gemma3":
        named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
        images: Any = Gemma3ImageProcessorPil(size=square)
        return Gemma3Processor(images, byte_tokenizer(**named), chat_template=template, image_seq_length=4)
    markers = ("<|vision_start|>", "<|vision_end|>") if name in ("qwen2_5_vl", "qwen3_vl") else ()
    place = "<|image_pad|>" if name in QWEN else PLACE[name]
    tokenizer = byte_tokenizer(place, "<|video_pad|>", "<fake_token_around_image>", *markers, **tokenizer_options)
    if name == "llava":
        images = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
        options = {"patch_size": 14, "vision_feature_select_strategy": "full"}
        return LlavaProcessor(images, tokenizer, chat_template=template, **options)
    if name in QWEN:
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28)
        return QWEN[name](images, tokenizer, chat_template=template)
    if name in ("idefics3", "smolvlm"):
        kind, whole = {
            "idefics3": (Idefics3ImageProcessorPil, Idefics3Processor),
            "smolvlm": (SmolVLMImageProcessorPil, SmolPhotosOnly),
        }[name]
        images = kind(size={"longest_edge": 28}, max_image_size={"longest_edge": 14})
        return whole(images, tokenizer, image_seq_len=3, chat_template=template)
    if name == "mllama":
        images = MllamaImageProcessorPil(size=square, max_image_tiles=2)
        return MllamaProcessor(images, tokenizer, chat_template=template)
    images = SiglipImageProcessorPil(size=square)
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, tokenizer)


def image(width: int = 40, height: int = 30, shade: int = 100) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB").point(lambda value: (value + shade) % 256)


def user(*content: Any) -> list[dict[str, Any]]:
    """A user turn: of a text, or of parts."""
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def row(images: list[Image.Image], prompt: str, chosen: str = "Yes, it is.", rejected: str = "No.") -> dict[str, Any]:
    return {"images": images, "prompt": user(prompt), "chosen": assistant(chosen), "rejected": assistant(rejected)}


def text_of(batch: dict[str, Any], index: int, tokenizer: Any, mask: str = "attention_mask") -> str:
    return tokenizer.decode(batch["input_ids"][index][batch[mask][index].bool()])


def one_image_rows() -> list[dict[str, Any]]:
    return [row([image()], "Is it light?"), row([image(30, 60, 7)], "A cat?", "No, a dog.", "Yes!")]
