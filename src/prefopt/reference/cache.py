"""Reference log-probs on disk, found by what was scored and by what scored it.

A folder per reference holds shards that are written once and never changed. A shard's file name is the checksum of
its bytes: one that was cut short, damaged or written halfway does not match its name and is not read. Two processes
write two shards (or twice the same one), so neither waits for the other and nothing is ever overwritten.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from prefopt.files import replace_file
from prefopt.types import PAIR, Branch

__all__ = ["ReferenceCache", "cache_folder"]

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SUFFIX = ".safetensors"

FOLDER = "reference_logps"
"""In the folder of caches, and in a checkpoint."""
OFF = "off"
"""The value of ``PREFOPT_CACHE`` with which nothing is remembered."""

Values = tuple[float, ...]
"""log p of the chosen and of the rejected completion, nats."""


def cache_folder() -> Path | None:
    """Where caches are kept: ``$PREFOPT_CACHE``, else ``$XDG_CACHE_HOME/prefopt``, else ``~/.cache/prefopt``.

    None: nowhere, because ``PREFOPT_CACHE`` is ``off``, or the user has no home.
    """
    own = os.environ.get("PREFOPT_CACHE")
    if own:
        return None if own == OFF else Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "prefopt"
    try:
        return Path.home() / ".cache" / "prefopt"
    except RuntimeError:  # what pathlib raises for a user id that no account has, as in some containers
        return None


class ReferenceCache:
    """log pi_ref of the chosen and rejected completion of rows, in nats, by row key (`row_keys`).

    Args:
        folder: parent of all references' folders; None: `cache_folder`.
        reference: fingerprint of the reference (`ModelReference.fingerprint`).
    """

    def __init__(self, folder: str | os.PathLike[str] | None, reference: str) -> None:
        parent = cache_folder() if folder is None else Path(folder)
        self.folder = None if parent is None else parent / FOLDER / reference
        self.reference = reference
        self.values: dict[bytes, Values] = {}
        self.pending: dict[bytes, Values] = {}
        """What `put` brought since the last `flush` or `take`."""
        self.shards: set[str] = set()
        self.reload()

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, key: bytes) -> bool:
        return key in self.values

    def get(self, keys: Iterable[bytes]) -> list[dict[Branch, float] | None]:
        """For each key branch -> log p, or None where it is not known."""
        found = (self.values.get(key) for key in keys)
        return [None if values is None else dict(zip(PAIR, values, strict=True)) for values in found]

    def put(self, entries: Mapping[bytes, Values]) -> None:
        """Take in log-probs; `flush` writes them.

        Args:
            entries: row key -> log p of chosen and rejected, nats; another rank's ``pending`` is of that form.
        """
        self.pending.update(entries)
        self.values.update(entries)

    def reload(self) -> None:
        """Read the shards that are new since the last time, also those of other processes. What is known stays."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder is not None else ():
            if path.name not in self.shards:
                self.shards.add(path.name)
                for key, values in read_shard(path, self.reference).items():
                    self.values.setdefault(key, values)

    def take(self) -> dict[bytes, Values]:
        """What is pending, which is then left to others to write."""
        pending, self.pending = self.pending, {}
        return pending

    def flush(self) -> None:
        """Write what is pending as one shard. A folder that cannot be written costs the cache, not the run."""
        pending = self.take()
        if pending and self.folder is not None:
            try:
                self.shards.add(write_shard(self.folder, pending, self.reference))
            except OSError as error:
                logger.warning(
                    "The reference log-probs could not be written to %s (%s); the run goes on, the next one computes "
                    "them anew. Set PREFOPT_CACHE to a folder with space that can be written, or to `off`.",
                    self.folder,
                    error,
                )


def write_shard(folder: Path, entries: Mapping[bytes, Values], reference: str) -> str:
    """Write a shard, whole or not at all; the file's name."""
    tensors = {
        "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "sum_logps": np.array(list(entries.values()), dtype=np.float64),
    }
    content = save(tensors, metadata={"reference": reference, "branches": ",".join(PAIR), "unit": "nats"})
    folder.mkdir(parents=True, exist_ok=True)
    name = checksum(content) + SUFFIX
    replace_file(folder / name, content)
    return name


def read_shard(path: Path, reference: str) -> dict[bytes, Values]:
    """The entries of a shard; none, with a warning, where it is damaged or belongs to another reference."""
    try:
        content = path.read_bytes()
        if checksum(content) != path.stem:
            raise ValueError("its bytes do not match its name")
        if metadata(content)["reference"] != reference:
            raise ValueError("it belongs to another reference")
        tensors = load(content)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("%s is not read (%s); its log-probs are computed anew. It can be deleted.", path, error)
        return {}
    return {
        key.tobytes(): tuple(values) for key, values in zip(tensors["keys"], tensors["sum_logps"].tolist(), strict=True)
    }


def metadata(content: bytes) -> dict[str, str]:
    """What `write_shard` noted in the header, whose length stands in the first 8 bytes."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def checksum(content: bytes) -> str:
    return blake2b(content, digest_size=20).hexdigest()
