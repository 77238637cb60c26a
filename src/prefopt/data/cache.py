"""The key under which ``datasets`` keeps a prepared set: everything its content depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets.fingerprint import Hasher

from prefopt.data.images import has_images
from prefopt.data.template import tokenizer_of

__all__ = ["cache_key", "processing_fingerprints"]


def cache_key(dataset: Any, processing_class: Any, *settings: Any) -> str:
    """A fingerprint of the rows, the tokenizer's content, its templates, what a processor does with images,
    ``settings``, and the code that prepares.

    Names and paths are not part of it: the same tokenizer under another path gives the same key.
    """
    hasher = Hasher()
    versions = (transformers.__version__, tokenizers.__version__)
    content = (_tokenizer_content(processing_class), _image_settings(processing_class))
    for part in (dataset._fingerprint, content, settings, versions, _code()):
        hasher.update(part)
    return hasher.hexdigest()


def processing_fingerprints(processing_class: Any) -> dict[str, str]:
    """Part of what turns text and images into tokens -> its fingerprint, whatever its path."""
    kind, vocabulary, templates, special = _tokenizer_content(processing_class)
    parts = {
        "tokenizer": [kind, vocabulary, special],
        "chat template": templates,
        "image processor": _image_settings(processing_class),
    }
    return {name: Hasher.hash(part) for name, part in parts.items()}


def _tokenizer_content(processing_class: Any) -> list[Any]:
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
        # What stands before the added tokens is the padding and truncation of the last call.
        vocabulary: Any = hashlib.sha256(text[text.index('"added_tokens"') :].encode()).hexdigest()
    else:
        vocabulary = (tokenizer.get_vocab(), {k: v for k, v in tokenizer.init_kwargs.items() if k != "name_or_path"})
    templates = [getattr(part, "chat_template", None) for part in (processing_class, tokenizer)]
    return [type(tokenizer).__qualname__, vocabulary, templates, dict(tokenizer.special_tokens_map)]


def _image_settings(processing_class: Any) -> Any:
    """What decides how many tokens an image gets, and where: sizes, patches, markers."""
    if not has_images(processing_class):
        return None
    settings = processing_class.to_dict()
    return type(processing_class).__qualname__, settings, getattr(processing_class, "images_kwargs", None)


def _code() -> list[bytes]:
    """The source of this folder: a release that prepares otherwise finds no old rows."""
    return [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
