"""Which files and addresses data may name as images: those within the roots that the user allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from datasets import config

__all__ = ["DEFAULT_ROOTS", "located"]

DEFAULT_ROOTS = (".", str(config.HF_DATASETS_CACHE), str(config.HF_CACHE_HOME) + "/hub")
"""The working directory, and where `datasets` and the Hub's client keep what they load."""


def located(name: str, roots: Sequence[str]) -> str:
    """Where an image is that data name; a relative path starts at the first root that has such a file.

    Args:
        name: a path, or an address with ``://``.
        roots: folders, and beginnings of addresses. A path must lie in a folder when its links are followed.

    Raises:
        ValueError: it lies in none of them.
        FileNotFoundError: it would, and is not there.
    """
    address = urlsplit(name)
    if address.scheme == "file" and not address.netloc:
        name = unquote(address.path)
    if "://" in name:
        beginnings = [f"{root.rstrip('/')}/" for root in roots if "://" in root]
        if any(name.startswith(beginning) for beginning in beginnings) and ".." not in unquote(address.path).split("/"):
            return name
    else:
        folders = [Path(root).resolve() for root in roots if "://" not in root]
        places = [(folder / name).resolve() for folder in folders]
        within = [path for path, folder in zip(places, folders, strict=True) if path.is_relative_to(folder)]
        if within:
            found = next((path for path in within if path.is_file()), None)
            if found is None:
                raise FileNotFoundError(f"{name!r}: there is no such file within {', '.join(roots)}")
            return str(found)
    raise ValueError(f"{name!r} is not within {', '.join(roots)}; image_roots says where images may lie")
