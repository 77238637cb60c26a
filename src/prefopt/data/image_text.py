"""Images as text: what a processor writes in an image's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefopt.data.errors import bad_row
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.data.images import (
    StoredImage,
    decoded_image,
    has_images,
    image_token,
    image_token_ids,
    opened_image,
    stored_image,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageReader", "PictureReader", "RowImage", "expanded", "make_reader"]


@dataclass(frozen=True)
class ImageText:
    """What a processor writes for an image; its tokens are those before the placeholders, these, and those after."""

    text: str
    num_before: int
    num_placeholders: int
    num_after: int


@dataclass(frozen=True)
class RowImage:
    """An image of a row."""

    stored: StoredImage
    written: ImageText


@dataclass(frozen=True)
class PictureReader:
    """Reads the images of rows, as pictures."""

    processor: Any
    roots: tuple[str, ...] = DEFAULT_ROOTS
    """Folders and beginnings of URLs within which images lie that data name."""

    @cached_property
    def token(self) -> str:
        """What stands for an image in a text that the processor is given."""
        return image_token(self.processor)

    def __call__(self, value: Any, row: int, column: str) -> Any:
        """An image in any spelling of :func:`~prefopt.data.images.stored_image`.

        Raises:
            ValueError: it is no image, or cannot be read; ``row`` and ``column`` are named.
        """
        with readable(row, column):
            return opened_image(value, self.roots)


@dataclass(frozen=True)
class ImageReader(PictureReader):
    """Reads the images of rows: opens each once, and asks the processor what stands for it."""

    _written: dict[tuple[int, int], ImageText] = field(default_factory=dict, repr=False)
    """Width and height of an image -> what stands for it: processors decide by the size alone."""

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """The placeholders that the model replaces by what it sees."""
        return image_token_ids(self.processor)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokenizer's special tokens."""
        decoder = self.processor.tokenizer.added_tokens_decoder
        return frozenset(index for index, token in decoder.items() if token.special)

    def __call__(self, value: Any, row: int, column: str) -> RowImage:
        with readable(row, column):
            stored = stored_image(value, self.roots)
            picture = decoded_image(stored)
        if picture.size not in self._written:
            self._written[picture.size] = self._text_of(picture, row, column)
        return RowImage(stored, self._written[picture.size])

    def _text_of(self, picture: Image, row: int, column: str) -> ImageText:
        processed = self.processor(
            images=[[picture]], text=[self.token], add_special_tokens=False, return_text_replacement_offsets=True
        )
        if "text_replacement_offsets" not in processed:
            problem = f"{type(self.processor).__name__} puts no tokens in an image's place"
            fix = "Models that see images beside their text are not supported: use one whose text has tokens for them."
            raise bad_row(row, column, problem, fix)
        [[place]] = processed["text_replacement_offsets"]
        ids = self.processor.tokenizer(place["replacement"], add_special_tokens=False)["input_ids"]
        places = [index for index, token in enumerate(ids) if token in self.token_ids]
        return ImageText(place["replacement"], places[0], len(places), len(ids) - 1 - places[-1])


@contextmanager
def readable(row: int, column: str) -> Iterator[None]:
    """Within it, what is raised is an error that names row and column of an image."""
    try:
        yield
    except Exception as error:  # files, network and image formats raise many kinds
        problem = f"the image cannot be read ({type(error).__name__}: {error})"
        fix = "Give a PIL image, the bytes of an image file, its path, or {'bytes': .., 'path': ..}."
        raise bad_row(row, column, problem, fix) from error


def make_reader(processing_class: Any, roots: tuple[str, ...] = DEFAULT_ROOTS) -> ImageReader | None:
    """What reads images for ``processing_class``; ``None`` for a tokenizer."""
    return ImageReader(processing_class, roots) if has_images(processing_class) else None


def expanded(text: str, token: str, images: Sequence[RowImage]) -> str:
    """``text`` with what stands for each image in the place of its ``token``, as far as it has places."""
    first, *others = text.split(token)
    written = [image.written.text for image in images[: len(others)]]
    written += [token] * (len(others) - len(written))
    return first + "".join(before + after for before, after in zip(written, others, strict=True))
