"""``prefopt quickstart``: a small shipped model, trained on generated preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.cli.errors import UserError
from prefopt.cli.own_parser import OwnParser

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """The command; 0 when the model learned it, 1 when not."""
    options = parser().parse_args(arguments)
    from prefopt.quickstart.run import run

    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {options.output_dir}: {error}; choose another folder") from error
    return 0 if run(options.seed, options.output_dir).has_risen else 1


def parser() -> OwnParser:
    made = OwnParser(
        prog="prefopt quickstart",
        description="Train a small shipped model with DPO on generated preferences; no network, about a minute.",
    )
    made.add_argument("--seed", type=int, default=0, help="of the pairs and of the training (0)")
    made.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="runs/quickstart")
    return made
