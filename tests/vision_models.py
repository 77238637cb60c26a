"""Tiny vision-language models with their processors, and pairs with images for them, built without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from batching.tiny_processors import PLACE, PhotosOnly, byte_tokenizer, image, processor
from families import randomise
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaNextProcessor, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prefopt.batching.images import VisionInputs, vision_inputs
from prefopt.data.images import image_tensors
from prefopt.scoring.forward import install
from prefopt.trainer.setup import disable_dropout
from prefopt.types import Branch, TokenizedExample

VOCABULARY = 320
HIDDEN = 32
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
LLAMA = {"text_config": {"model_type": "llama", **TEXT}}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
SEES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP: dict[str, Any] = {
    "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **SEES},
    "vision_feature_layer": -1,
}
WINDOW = 6
"""Tokens that a sliding layer of gemma3 sees; an image has 4 and markers, so windows end within images."""

TILES = [[28, 28], [28, 56], [56, 28]]
"""Sizes of which llava_next cuts an image into tiles."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        **LLAMA,
        **CLIP,
    },
    "llava_next": {
        **LLAMA,
        **CLIP,
        "image_grid_pinpoints": TILES,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, **ROTARY},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **ROTARY},
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {**TEXT, **ROTARY},
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    "idefics3": {**LLAMA, "vision_config": {"image_size": 14, "patch_size": 7, **SEES}, "scale_factor": 1},
    "smolvlm": {**LLAMA, "vision_config": {"image_size": 14, "patch_size": 7, **SEES}, "scale_factor": 1},
    "gemma3": {
        "text_config": {
            **TEXT,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {"image_size": 14, "patch_size": 7, "vision_use_head": False, **SEES},
        "mm_tokens_per_image": 4,
    },
}
"""Config of each family that is trained on images."""

PROCESSORS = {"llava_next": "llava", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen2_vl", "smolvlm": "idefics3"}
"""Family -> the family whose processor writes its images in the same way."""

CALLED_WITH = {
    **dict.fromkeys(("llava", "llava_next", "gemma3"), "vision_tower"),
    **dict.fromkeys(("idefics3", "smolvlm"), "vision_model"),
}
"""Family -> its part that encodes images; ``visual`` for the others."""


def processor_of(family: str) -> Any:
    if family == "llava_next":
        size = {"height": 28, "width": 28}
        images: Any = LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=TILES)
        options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaNextProcessor(images, byte_tokenizer(PLACE["llava"]), **options)
    made = processor(PROCESSORS.get(family, family))
    if family == "qwen3_vl":
        images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, max_pixels=4 * 32 * 32)
        tokenizer = byte_tokenizer(PLACE["qwen2_vl"], "<|video_pad|>")
        return PhotosOnly(images, tokenizer, chat_template=made.chat_template)
    if hasattr(made, "image_seq_len"):
        made.image_seq_len = 4
    return made


def tiny_vision(family: str, made: Any) -> PreTrainedModel:
    """A random model without dropout, able to score, for the processor ``made``."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], image_token_id=made.image_token_ids[0])
    model = AutoModelForImageTextToText.from_config(config).float()
    randomise(model)
    install(model)
    disable_dropout(model)
    return model.eval()


def vision_of(model: PreTrainedModel, made: Any) -> VisionInputs:
    found = vision_inputs(model, lambda images: image_tensors(made, images))
    assert found is not None
    return found


SHAPES = [(70, 30), (30, 75), (60, 60), (28, 28), (64, 32), (70, 30), (70, 30), (70, 30)]
PICTURES = [image(*shape, 30 * number) for number, shape in enumerate(SHAPES)]
"""Of different shades."""

ROWS: list[dict[str, tuple[str, list[int]]]] = [
    {"prompt": ("What is @ this?", [0]), "chosen": (" A cat.", []), "rejected": (" A dog, maybe.", [])},
    {"prompt": ("No picture", []), "chosen": (" yes", []), "rejected": (" n", [])},
    {"prompt": ("@ or @?", [1, 2]), "chosen": (" The second", []), "rejected": (" first one", [])},
    {"prompt": ("Draw ", []), "chosen": ("like @ this", [3]), "rejected": ("so: @ and @.", [4, 0])},
    {"prompt": ("@ or @?", [0, 5]), "chosen": ("! @, so", [6]), "rejected": ("! @ no", [7])},
]
"""Part -> its text, with @ for an image, and its pictures: one, none, two, others on the two sides, and both."""


def ids_of(made: Any, family: str, text: str, pictures: list[int]) -> dict[str, Any]:
    """What the processor makes of a text and its pictures: [1, T]."""
    place = PLACE[PROCESSORS.get(family, family)]
    images = [[PICTURES[index] for index in pictures]] if pictures else None
    options = {"return_tensors": "pt", "add_special_tokens": False}
    return dict(made(images=images, text=[text.replace("@", place)], **options))


def examples(made: Any, family: str, numbers: Sequence[int] | None = None) -> list[TokenizedExample]:
    """The rows, or those of these numbers, as the data stage makes them."""
    found = []
    for number in range(len(ROWS)) if numbers is None else numbers:
        ids = {part: ids_of(made, family, *value)["input_ids"][0].tolist() for part, value in ROWS[number].items()}
        completions: dict[Branch, Any] = {branch: ids[branch] for branch in ("chosen", "rejected")}
        masks: dict[Branch, Any] = {
            branch: [token not in made.image_token_ids for token in tokens] for branch, tokens in completions.items()
        }
        images = {part: [PICTURES[index] for index in value[1]] for part, value in ROWS[number].items() if value[1]}
        found.append(TokenizedExample(number, ids["prompt"], completions, masks, images=images))
    return found


def oracle_logps(model: PreTrainedModel, made: Any, family: str, pairs: list[TokenizedExample]) -> Tensor:
    """[N] log-probs in the order of a batch: each sequence alone, by the whole processor and the model's own logits."""
    found = []
    for branch in ("chosen", "rejected"):
        for pair in pairs:
            (prompt, first), (completion, second) = ROWS[pair.row]["prompt"], ROWS[pair.row][branch]
            inputs = ids_of(made, family, prompt + completion, first + second)
            assert inputs["input_ids"][0].tolist() == [*pair.prompt_ids, *pair.completion_ids[branch]]
            logps = model(**inputs).logits[0].float().log_softmax(-1)
            for place, scored in enumerate(pair.loss_masks[branch], start=len(pair.prompt_ids)):
                if scored:
                    found.append(logps[place - 1, inputs["input_ids"][0, place]])
    return torch.stack(found)
