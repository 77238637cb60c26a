"""The collator for pairs with images: raw rows to padded tensors, with what the model's processor makes of the images.

A row is rendered as text; the processor expands the images of the prompt; the tokens of the completions follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin

from prefopt.batching.collators import padded
from prefopt.batching.padded import padded_width
from prefopt.batching.vision_rows import RenderedRow, broken_row, rendered_row, shared_length
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.data.images import image_token_ids
from prefopt.types import PAIR, Branch

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

__all__ = ["DataCollatorForVisionPreference"]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Keys of the processor that say of each token whether it is text, which is 0."""


@dataclass
class DataCollatorForVisionPreference(DataCollatorMixin):
    """Renders, tokenises and pads pairs with images: ``input_ids``, ``attention_mask``, ``completion_mask`` [2 P, T].

    Rows are prompt + chosen for every pair, then prompt + rejected, int64, padded on the right. What the processor
    makes of the images (``pixel_values``, ``image_grid_thw``, ..) is computed once per pair and listed for the chosen
    rows, then again for the rejected ones; ``token_type_ids`` and the like have the shape of ``input_ids``. Users call
    it themselves: the trainers make batches of prepared rows, in which an image of a prompt stands once.

    A row has ``images`` (or one ``image``, or none) and ``prompt``, ``chosen``, ``rejected``: messages, or text that
    holds the processor's image tokens. It may have ``tools`` and ``chat_template_kwargs`` (objects or JSON text),
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (float32 [P]). Messages without a place for the images get them at
    the start of the first user turn. Text is taken as it is: no BOS or EOS is added. A completion starts where the
    tokens of the prompt alone and those of the two together part. Of several turns the assistant's are trained on, or
    the whole completion where the chat template rewrites earlier turns.

    Args:
        processor: renders messages, and makes tokens and tensors of text and images.
        max_length: tokens kept of each prompt + completion; it must reach the end of the last image. None keeps all.
        pad_to_multiple_of: T is rounded up to a multiple of it.
        return_tensors: only ``"pt"``.
        image_roots: folders and beginnings of URLs within which images must lie that rows name by path or URL.

    Raises:
        ValueError: a row is broken, or ``max_length`` would cut its images; it is named by its place in the batch.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    image_roots: tuple[str, ...] = DEFAULT_ROOTS

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """What the processor makes of P rows: ``input_ids`` [2 P, T] with masks beside, and the images' tensors."""
        rows = [
            rendered_row(example, number, self.processor, self.image_roots) for number, example in enumerate(examples)
        ]
        prompts = self._processed_prompts(rows)
        lengths = prompts["attention_mask"].sum(1).tolist()
        pairs = [self._sequences(row, prompts["input_ids"][i, : lengths[i]].tolist()) for i, row in enumerate(rows)]
        sequences = [pair[branch] for branch in PAIR for pair in pairs]
        width = padded_width(max(s.num_tokens for s in sequences), self.pad_to_multiple_of)
        pad_token_id = self.processor.tokenizer.pad_token_id
        output: dict[str, Any] = {
            "input_ids": padded([s.prompt_ids + s.completion_ids for s in sequences], pad_token_id, width),
            "attention_mask": padded([[1] * s.num_tokens for s in sequences], 0, width),
            "completion_mask": padded([[0] * len(s.prompt_ids) + s.completion_mask for s in sequences], 0, width),
        }
        for key, value in prompts.items():
            if key not in output:
                is_per_token = torch.is_tensor(value) and value.shape[:2] == prompts["input_ids"].shape
                output[key] = per_token(key, value, sequences, width) if is_per_token else listed_twice(value)
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            if column in examples[0]:
                output[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return output

    def _processed_prompts(self, rows: Sequence[RenderedRow]) -> dict[str, Any]:
        """The processor's tensors of the P prompts; ``images`` may be empty for some of them, but not for all."""
        inputs: dict[str, Any] = {
            "images": [row.images for row in rows] if any(row.images for row in rows) else None,
            "text": [row.prompt for row in rows],
            "add_special_tokens": False,  # a chat template writes them
            "padding": True,
            "padding_side": "right",
            "return_tensors": "pt",
        }
        processed = self.processor(**inputs)
        if "labels" in processed:
            raise ValueError(
                f"{type(self.processor).__name__} is made for models that read a prompt in both directions and a "
                "completion in one, which this collator does not support. Use a model that reads both in one direction."
            )
        return dict(processed)

    def _sequences(self, row: RenderedRow, prompt_ids: list[int]) -> dict[Branch, TokenSequence]:
        """The two sequences of a row, with the images expanded as in ``prompt_ids``, each within ``max_length``."""
        tokenize = partial(self.processor.tokenizer, add_special_tokens=False)
        alone, *together = tokenize([row.prompt, *row.texts.values()])["input_ids"]
        cut = shared_length(alone, *together)  # before the prompt's end where tokens merge across it
        kept = len(prompt_ids) - (len(alone) - cut)
        if prompt_ids[kept:] != alone[cut:]:
            problem = "its last tokens merge with the completion's, and the processor adds other tokens between them"
            raise broken_row(row.number, "prompt", problem, "Begin the completions with a space or a line break.")
        self._check_images_fit(row, prompt_ids[:kept])
        sequences: dict[Branch, TokenSequence] = {}
        for branch, ids in zip(row.texts, together, strict=True):
            mask = trained_tokens(row, branch, ids, cut, tokenize)
            whole = TokenSequence(row.number, prompt_ids[:kept], ids[cut:], mask[cut:])
            sequences[branch] = whole.truncated(self.max_length)
        return sequences

    def _check_images_fit(self, row: RenderedRow, prompt_ids: Sequence[int]) -> None:
        """Raises ValueError where ``max_length`` would cut image tokens; unknown ones may be all of the prompt."""
        image_ids = image_token_ids(self.processor) or set(prompt_ids)
        end = max((place + 1 for place, token in enumerate(prompt_ids) if token in image_ids), default=0)
        if row.images and self.max_length is not None and self.max_length < end:
            problem = f"max_length={self.max_length} would cut its images, whose last token is number {end}"
            fix = f"Set max_length to {end} and what the text needs, or to None, or make the images smaller."
            raise broken_row(row.number, "images", problem, fix)


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and one completion."""

    pair: int
    """Row of the processor's tensors that the prompt comes from."""
    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[int]
    """1 for the completion's tokens that are trained on."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def truncated(self, max_length: int | None) -> TokenSequence:
        room = None if max_length is None else max(max_length - len(self.prompt_ids), 0)
        prompt_ids, completion_ids = self.prompt_ids[:max_length], self.completion_ids[:room]
        return TokenSequence(self.pair, prompt_ids, completion_ids, self.completion_mask[:room])


def trained_tokens(
    row: RenderedRow, branch: Branch, ids: list[int], cut: int, tokenize: Callable[..., Any]
) -> list[int]:
    """The mask of prompt and completion together: 1 for the tokens of the turns that are trained on."""
    text = row.texts[branch]
    places = {len(row.prompt): cut, len(text): len(ids)}
    mask = [0] * len(ids)
    for span in row.trained[branch]:
        for end in set(span) - places.keys():
            places[end] = shared_length(tokenize(text[:end])["input_ids"], ids)
        first, last = (places[end] for end in span)
        mask[first:last] = [1] * (last - first)
    return mask


def per_token(key: str, value: Tensor, sequences: Sequence[TokenSequence], width: int) -> Tensor:
    """[2 P, width, ..] from what the processor says of each prompt token, [P, T0, ..], and 0 for padding.

    A completion's tokens are text (0) to token types. Other keys, such as which images a token attends to, say of
    them what they say of the prompt's last token.
    """
    result = value.new_zeros((len(sequences), width, *value.shape[2:]))
    for place, sequence in enumerate(sequences):
        end = len(sequence.prompt_ids)
        result[place, :end] = value[sequence.pair, :end]
        if end and key not in TOKEN_TYPES:
            result[place, end : sequence.num_tokens] = value[sequence.pair, end - 1]
    return result


def listed_twice(value: Any) -> Any:
    """What the processor says of the images, of all pairs for the chosen rows and again for the rejected ones."""
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    return [*value, *value] if isinstance(value, list | tuple) else value
