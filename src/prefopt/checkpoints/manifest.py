"""The manifest of a checkpoint: size and checksum of every file, written last, so that it vouches for all of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from prefopt.files import write_file

__all__ = ["MANIFEST", "faults", "manifest_of", "write_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1
CHECKSUM = "xxh3_128"
"""It notices accidents as surely as a cryptographic one and is faster than any disk; against someone who can write to
the folder no checksum beside the files would help."""
SEAL = "checksum"
"""The manifest's own checksum, of everything else in it."""
WORKERS = 8


def write_manifest(folder: str | os.PathLike[str], step: int, run: str = "") -> None:
    """Write the manifest of all files under a folder, and sync it.

    Args:
        folder: in which nothing else will be written.
        step: of the run, in optimizer steps.
        run: the name of the run, which no other one has; none where it lies in no folder of a run.
    """
    paths = files_under(Path(folder))
    with ThreadPoolExecutor(WORKERS) as pool:
        checksums = list(pool.map(checksum, paths))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "checksum": found}
        for path, found in zip(paths, checksums, strict=True)
    }
    content: dict[str, Any] = {"format": FORMAT, "algorithm": CHECKSUM, "step": step, "files": entries}
    content |= {"run": run, "written": time.time_ns()}
    write_file(Path(folder, MANIFEST), json.dumps({**content, SEAL: seal(content)}, indent=1))


def manifest_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged, or of a format that this version does not know.
    """
    content = json.loads(Path(folder, MANIFEST).read_bytes().decode())
    if not isinstance(content, dict) or content.pop(SEAL, None) != seal(content):
        raise ValueError("its own checksum is wrong")
    if content["format"] != FORMAT or content["algorithm"] != CHECKSUM:
        raise ValueError(f"format {content['format']} with {content['algorithm']}: it was written by another version")
    return content


def faults(folder: str | os.PathLike[str], *, contents: bool = True) -> list[str]:
    """What is wrong with a folder by its manifest, a line for each file; empty where it is whole.

    Files that the manifest does not name are no fault: nothing of a run reads them.

    Args:
        folder: a checkpoint.
        contents: read every file; False compares the sizes only.
    """
    folder = Path(folder)
    try:
        entries = manifest_of(folder)["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is damaged ({error})"]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda item: fault(folder / item[0], item[1], contents), entries.items())
        return [f"{name} {what}" for name, what in zip(entries, found, strict=True) if what]


def fault(path: Path, entry: dict[str, Any], contents: bool) -> str | None:
    """What is wrong with one file, None where nothing is."""
    try:
        size = path.stat().st_size
        if size < entry["size"]:
            return f"is empty, not {entry['size']} bytes" if size == 0 else f"is cut to {size} of {entry['size']} bytes"
        if size > entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        if contents and checksum(path) != entry["checksum"]:
            return "was changed: its checksum is another"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def files_under(folder: Path) -> list[Path]:
    """All files under a folder but its manifest, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def checksum(path: Path) -> str:
    """The checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def seal(content: dict[str, Any]) -> str:
    """The checksum of a manifest's content, whatever its white space."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
