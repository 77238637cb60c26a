"""A model in place of a model: never half of one."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt import files

__all__ = ["install", "staged_model"]

INDEX = ".index.json"
WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")


def staged_model(folder: Path) -> Path:
    """Where the model that is to go into ``folder`` is written first; no upload to the Hub takes it along."""
    return folder / "_model.writing"


def install(staged: Path, folder: Path) -> None:
    """Move a model that was written to ``staged`` into ``folder``, file by file, its weights last.

    Every file is the old one or the new one, whole. Weights in several files must not mix: what names the old ones goes
    first and the index of the new ones comes last, without which none are loaded.
    """
    files.sync_tree(staged)
    new = sorted((path.relative_to(staged) for path in staged.rglob("*") if path.is_file()), key=order)
    for path in [path for path in new if path.name.endswith(INDEX)]:
        (folder / path).unlink(missing_ok=True)
        (folder / path).with_name(path.name.removesuffix(INDEX)).unlink(missing_ok=True)
    for path in new:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        files.rename(staged / path, folder / path)
    files.remove_tree(staged)


def order(path: Path) -> tuple[bool, bool, str]:
    """Sorts weights behind all else, and their index behind them."""
    is_weights = WEIGHTS.fullmatch(path.name) is not None
    return is_weights, path.name.endswith(INDEX), path.as_posix()
