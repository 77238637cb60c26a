"""Images as a row stores them, as pictures, and as what the model's processor makes of them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import fsspec
from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature

from prefopt.data.image_roots import DEFAULT_ROOTS, located

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "StoredImage",
    "decoded_image",
    "has_images",
    "image_tensors",
    "image_token",
    "image_token_ids",
    "opened_image",
    "stored_image",
    "undecoded",
]

StoredImage: TypeAlias = dict[str, Any]
"""An image as it came, ``{"bytes": .., "path": ..}``: the content of a file, or else where it is on this machine."""

TOKEN_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask"})
"""What a processor says of tokens; all else is of the images alone."""


def has_images(processing_class: Any) -> bool:
    """Whether ``processing_class`` is a processor that takes images, and says what stands for one in a text."""
    return all(getattr(processing_class, name, None) is not None for name in ("image_processor", "image_token"))


def image_token(processor: Any) -> str:
    """What stands for one image in a text that ``processor`` is given.

    Raises:
        ValueError: the processor does not say.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ValueError(
            f"{type(processor).__name__} does not say what stands for an image in a text. "
            "Set its attribute `image_token`, or use a model whose processor has one."
        )
    return str(token)


def image_token_ids(processor: Any) -> frozenset[int]:
    """The ids of the tokens that the model replaces by what it sees of an image; empty for a tokenizer."""
    if not has_images(processor):
        return frozenset()
    known = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return frozenset(int(token) for token in known if token is not None)


def image_tensors(processor: Any, images: Sequence[Image]) -> dict[str, Any]:
    """What ``processor`` makes of ``images`` alone: ``pixel_values``, ``image_grid_thw``, ``pixel_attention_mask``, ..

    Args:
        processor: of a vision-language model.
        images: pictures, in the order of their tokens; they count as those of one text.

    Returns:
        The keyword arguments of the model's forward that come from images, in the processor's own shapes; nothing for
        no images.
    """
    if not images:
        return {}
    text = image_token(processor) * len(images)
    processed = processor(images=[list(images)], text=[text], add_special_tokens=False, return_tensors="pt")
    return {key: value for key, value in processed.items() if key not in TOKEN_KEYS}


def stored_image(value: Any, roots: Sequence[str] = DEFAULT_ROOTS) -> StoredImage:
    """An image in any accepted spelling as it is stored with a row; nothing is decoded.

    A path stays a path; what is behind a URL is read. Pictures are stored as PNG.

    Args:
        value: a PIL image, an array [height, width, 3] of uint8, the content of a file, a path, a URL (``data:``,
            ``file:``, or any that fsspec reads), or a mapping with ``bytes`` or ``path``.
        roots: folders and beginnings of URLs within which a path or URL must lie.

    Raises:
        ValueError: it is none of these, or lies elsewhere.
        OSError: the URL cannot be read.
    """
    if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None):
        content = value.get("bytes")
        return stored_image(value["path"], roots) if content is None else {"bytes": bytes(content), "path": None}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, Path):
        return {"bytes": None, "path": located(str(value), roots)}
    if isinstance(value, str):
        return _from_text(value, roots)
    from PIL import Image  # not one of the package's requirements: processors of images require it

    if hasattr(value, "__array_interface__") and not isinstance(value, Image.Image):
        value = Image.fromarray(cast(Any, value))
    if isinstance(value, Image.Image):
        buffer = BytesIO()
        _upright(value).save(buffer, "PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}
    raise ValueError(f"expected an image, got {type(value).__name__}")


def undecoded(dataset: Dataset | IterableDataset) -> Any:
    """The data set with images as they are stored, in columns and within messages, and no other format."""
    plain = dataset.with_format(None)
    stored = {name: _stored(feature) for name, feature in (plain.features or {}).items()}
    if stored == dict(plain.features or {}):
        return plain
    if isinstance(plain, IterableDataset):
        return plain.decode(False)
    plain._info.features = Features(stored)  # `cast` would write the set anew
    return plain


def _stored(feature: Any) -> Any:
    """A feature whose images are not decoded."""
    if isinstance(feature, ImageFeature):
        return replace(feature, decode=False)
    if isinstance(feature, Mapping):
        return {key: _stored(item) for key, item in feature.items()}
    if isinstance(feature, list):
        return [_stored(item) for item in feature]
    inner = getattr(feature, "feature", None)
    return feature if inner is None else replace(feature, feature=_stored(inner))


def opened_image(value: Any, roots: Sequence[str] = DEFAULT_ROOTS) -> Image:
    """An image in any spelling of `stored_image` as a picture, RGB and upright.

    Raises:
        ValueError, OSError: it is no image, or cannot be read.
    """
    from PIL import Image

    return _upright(value) if isinstance(value, Image.Image) else decoded_image(stored_image(value, roots))


def _from_text(text: str, roots: Sequence[str]) -> StoredImage:
    """A path or a URL."""
    if text.startswith("data:"):
        try:
            return {"bytes": base64.b64decode(text.partition("base64,")[2], validate=True), "path": None}
        except binascii.Error as error:
            raise ValueError(f"the data: URL is not base64 ({error})") from None
    place = located(text, roots)
    if "://" not in place:
        return {"bytes": None, "path": place}
    with fsspec.open(place, "rb") as file:
        return {"bytes": file.read(), "path": None}  # type: ignore[union-attr]


def decoded_image(stored: Mapping[str, Any]) -> Image:
    """The picture, RGB and upright.

    Raises:
        OSError: there is no such file, or it is no image.
    """
    from PIL import Image

    content = stored.get("bytes")
    with Image.open(stored["path"] if content is None else BytesIO(content)) as image:
        return _upright(image)


def _upright(image: Image) -> Image:
    """RGB, turned as its EXIF data say."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")
