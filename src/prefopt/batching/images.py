"""What a vision-language model is given beside token ids: pixels, the kind of each token, positions within images.

Token ids hold the places of an image already, as many as the model makes features of it. Every model fills these
places in reading order, so a batch lists its images in the order in which their places stand in its rows; in a shared
row an image of the prompt stands once, and is encoded once.

All of this is made from ids and images alone, without weights, so that data-loader workers can do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Piece", "RopeIndex", "VisionInputs", "vision_inputs"]

TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")
"""Arguments of a model's forward that say of every token whether it is a place of an image: 1, else 0."""
GRIDS = "image_grid_thw"
"""[images, 3] the patches of each image in time, height and width."""

OTHERWISE = {
    "cross_attention_mask": "read images in layers of their own, beside their tokens",
    "batch_num_images": "make other tokens of an image where a text has several",
    "paligemma": "read prompts in both directions, so that they cannot be scored as text",
}
"""An argument of the forward, or a model type -> what sets such models apart."""


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together in a row, and what comes before them on their path."""

    ids: np.ndarray
    before: np.ndarray
    images: tuple[Any, ...] = ()
    """Those whose places are among ``ids``, in order."""
    images_before: tuple[Any, ...] = ()

    @property
    def positions(self) -> np.ndarray:
        """[n] places on the path, counted in tokens."""
        return np.arange(len(self.before), len(self.before) + len(self.ids))


@dataclass(frozen=True)
class RopeIndex:
    """``get_rope_index`` of a model class, which reads nothing of a model but its config."""

    model_class: type[Any]
    config: Any

    def __call__(self, ids: np.ndarray, is_image: np.ndarray, grids: Sequence[Tensor]) -> np.ndarray:
        """[3, n] positions in time, height and width of the n tokens of a path."""
        bare: Any = object.__new__(self.model_class)  # without weights
        vars(bare)["config"] = self.config
        positions, _ = bare.get_rope_index(
            torch.from_numpy(ids)[None],
            mm_token_type_ids=torch.from_numpy(is_image.astype(np.int64))[None],
            image_grid_thw=torch.stack(list(grids)) if grids else None,
        )
        return positions[:, 0].numpy()


@dataclass(frozen=True)
class VisionInputs:
    """How the images of a batch reach a model; picklable where ``process`` is."""

    process: Callable[[list[Any]], Mapping[str, Any]]
    """Images -> the tensors that the model's processor makes of them."""
    model_type: str
    image_token_id: int
    """Of the places that the model fills with features."""
    arguments: frozenset[str]
    """Names of the arguments of the model's forward."""
    rope_index: RopeIndex | None
    """For models whose positions have three dimensions; None: they count tokens."""

    @property
    def sees_whole_images(self) -> bool:
        """Whether the places of an image see each other in both directions (gemma3)."""
        return "token_type_ids" in self.arguments

    def is_image(self, ids: Any) -> Any:
        """Of the shape of ``ids``, bool."""
        return ids == self.image_token_id

    def blocks(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Where runs of places begin and end among ``ids``, if they see each other in both directions."""
        if not self.sees_whole_images:
            return []
        changes = np.flatnonzero(np.diff(self.is_image(ids).astype(np.int8), prepend=0, append=0))
        return [(int(start), int(end)) for start, end in changes.reshape(-1, 2)]

    def token_kinds(self, input_ids: Tensor) -> dict[str, Tensor]:
        """[R, T] for each of `TOKEN_KINDS` that the model takes, int64."""
        return {name: self.is_image(input_ids).long() for name in TOKEN_KINDS if name in self.arguments}

    def tensors(self, images: Sequence[Any]) -> dict[str, Any]:
        """What the processor makes of the images, as far as the model's forward takes it.

        Raises:
            ValueError: for a model whose images do not stand among its tokens.
        """
        if not images:
            return {}
        for name, reason in OTHERWISE.items():
            if name in (*self.arguments, self.model_type):
                raise ValueError(
                    f"Models of the type {self.model_type!r} are not trained on images: they {reason}. Use a model "
                    "whose images are tokens among others, or remove the column of images."
                )
        return {name: value for name, value in self.process(list(images)).items() if name in self.arguments}

    def positions(self, pieces: Sequence[Piece], tensors: dict[str, Any]) -> list[np.ndarray] | None:
        """[3, n] for each piece; None where tokens are counted.

        Args:
            pieces: of a batch; each image stands in one of them, or is equal wherever it stands.
            tensors: of `tensors`, of the images of the pieces in order.
        """
        if self.rope_index is None or GRIDS not in tensors:
            return None
        images = [image for piece in pieces for image in piece.images]
        grids = {id(image): grid for image, grid in zip(images, tensors[GRIDS], strict=True)}
        found = []
        for piece in pieces:
            ids = np.concatenate([piece.before, piece.ids])
            own = [grids[id(image)] for image in (*piece.images_before, *piece.images)]
            found.append(self.rope_index(ids, self.is_image(ids), own)[:, len(piece.before) :])
        return found


def vision_inputs(model: Any, process: Callable[[list[Any]], Mapping[str, Any]]) -> VisionInputs | None:
    """How images reach a transformers model, bare; None for a text model.

    Args:
        model: of which the class and the config are kept.
        process: images -> the tensors that the model's processor makes of them.
    """
    token_id = getattr(model.config, "image_token_id", None)
    if token_id is None:
        return None
    rope: Any = next((part for part in model.modules() if hasattr(part, "get_rope_index")), None)
    return VisionInputs(
        process=process,
        model_type=model.config.model_type,
        image_token_id=token_id,
        arguments=frozenset(inspect.signature(type(model).forward).parameters),
        rope_index=None if rope is None else RopeIndex(type(rope), rope.config),
    )
