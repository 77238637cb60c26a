"""``prefopt merge RUN --output_dir DIR``: an adapter merged into its base, checked."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.cli.errors import users_mistakes
from prefopt.cli.own_parser import OwnParser
from prefopt.terminal import without_bars

__all__ = ["main"]


def main(arguments: Sequence[str] = ()) -> int:
    """Merges; 0 when the model is written, 1 when it did not compute the same and was not."""
    options = parser().parse_args(list(arguments))
    with users_mistakes(), without_bars():
        from prefopt.inspection.merging import NotTheSameError, merge

        try:
            found = merge(options.run, options.output_dir, dtype=options.dtype, accept_rounding=options.accept_rounding)
        except NotTheSameError as error:
            from prefopt.terminal import harmless

            print(harmless(f"prefopt: {options.run}: {error}"))
            return 1
    print(
        f"{found.adapter} merged into {found.base}: {options.output_dir}\n"
        f"checked: logits differ by up to {found.logit_difference:.1e} of the largest, "
        f"{found.same_texts} of {found.num_texts} greedy texts are the same"
    )
    return 0


def parser() -> OwnParser:
    made = OwnParser(
        prog="prefopt merge",
        description="Merge the adapter of a run into its base model. The result is written only if it computes the "
        "same: logits of random tokens, greedy text.",
    )
    made.add_argument("run", metavar="RUN", help="a run's output_dir, a checkpoint, or any folder with an adapter")
    made.add_argument("--output_dir", required=True, help="of the merged model; a new folder")
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of its weights (float32)"
    )
    made.add_argument(
        "--accept_rounding", action="store_true", help="with a dtype of 16 bits: accept that greedy texts change"
    )
    return made
