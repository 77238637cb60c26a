"""``prefopt compare BASE TUNED --dataset_name DATA``: a tuned model beside its base."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prefopt.cli.errors import check_writable, users_mistakes, write_wanted
from prefopt.cli.own_parser import OwnParser
from prefopt.terminal import without_bars

if TYPE_CHECKING:
    from prefopt.inspection.comparing.comparison import Comparison
    from prefopt.inspection.comparing.statistics import Figure

__all__ = ["main"]

LEAST = {
    "max_rows": 1,
    "max_length": 1,
    "per_device_eval_batch_size": 1,
    "max_new_tokens": 1,
    "num_samples": 0,
    "num_kl_rows": 0,
}
"""Option -> the smallest value that makes sense."""
NUM_EXTREMES = 5
"""Pairs that are shown of those that were moved furthest, each way."""
NUM_SHOWN = 3
"""Samples in the terminal."""
WHOLE = 100_000
"""Characters of a line where there is no terminal: nothing is cut."""


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the comparison, and writes it as HTML and JSON where that is asked for."""
    options = parser().parse_args(list(arguments))
    wanted = [(f"--{name}", getattr(options, name), make) for name, make in (("html", page), ("json", as_json))]
    wanted = [each for each in wanted if each[1] is not None]
    for option, path, _ in wanted:
        check_writable(option, path)
    with users_mistakes(), without_bars():
        found = comparison(options)
    show(found)
    for option, path, make in wanted:
        write_wanted(option, path, make(found))
        print(f"written: {path}")
    return 0


def parser() -> OwnParser:
    made = OwnParser(
        prog="prefopt compare",
        description="A tuned model beside the model it was tuned from, on preference data: accuracy, margins, shift of "
        "the log-probs, KL, lengths, samples. Models are folders or Hub names, of whole models or adapters.",
    )
    made.add_argument("base", metavar="BASE", help="the model before tuning")
    made.add_argument("tuned", metavar="TUNED", help="the model after it, a run's folder for example")
    made.add_argument("--dataset_name", required=True, help="file, folder or Hub name of preference pairs")
    made.add_argument("--dataset_config", help="configuration of a data set on the Hub")
    made.add_argument("--dataset_test_split", help="default: test where there is one, else train")
    made.add_argument("--max_rows", type=int, default=1000, help="rows that are looked at, the first ones (1000)")
    made.add_argument(
        "--max_length", type=length, default=1024, help="tokens of a pair's side; none cuts nothing (1024)"
    )
    made.add_argument("--per_device_eval_batch_size", type=int, default=8, help="pairs at once (8)")
    made.add_argument(
        "--dtype", default="float32", choices=("auto", "bfloat16", "float16", "float32"), help="of the weights"
    )
    made.add_argument("--num_samples", type=int, default=8, help="prompts that both models complete (8)")
    made.add_argument("--max_new_tokens", type=int, default=128, help="of such a completion (128)")
    made.add_argument(
        "--num_kl_rows", type=int, default=32, help="pairs for which whole distributions are compared (32)"
    )
    made.add_argument("--html", metavar="FILE", help="write a page, in one file")
    made.add_argument("--json", metavar="FILE", help="write all numbers, those of each pair too")
    return made


def length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def comparison(options: argparse.Namespace) -> Comparison:
    """The comparison that the options ask for."""
    from prefopt.inspection.comparing.comparison import Settings, compared
    from prefopt.inspection.comparing.statistics import PairScores, worst_and_best

    def shown(scores: PairScores) -> list[int]:
        worst, best = worst_and_best(scores, NUM_EXTREMES)
        return [*worst, *best]

    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    settings = Settings(
        max_length=options.max_length,
        batch_size=options.per_device_eval_batch_size,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        num_kl_rows=options.num_kl_rows,
        dtype=options.dtype,
    )
    split, dataset = rows(options)
    return compared(options.base, options.tuned, dataset, settings, shown, split)


def rows(options: argparse.Namespace) -> tuple[str, Any]:
    """Name of the split, and its first rows."""
    from prefopt.data import load_source

    name, config, split = options.dataset_name, options.dataset_config, options.dataset_test_split
    loaded: Any = load_source(name, config, split)
    if split is None:
        split = "test" if "test" in loaded else "train" if "train" in loaded else next(iter(loaded))
        loaded = loaded[split]
    return split, loaded.select(range(min(len(loaded), options.max_rows)))


def show(found: Comparison) -> None:
    """The comparison in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from prefopt.terminal import harmless

    console = Console()
    if not console.is_terminal:
        console.width = WHOLE
    for remark in found.remarks:
        console.print(Text(harmless(remark)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(harmless(f"{found.tuned} beside {found.base}")))
    table.add_column(f"{len(found.scores.rows)} pairs", no_wrap=True)
    for header in ("base", "tuned", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for *row, _ in figures(found):
        table.add_row(*row)
    console.print(table)
    console.print("accuracies are shares of pairs; log p, margin and KL in nats, KL per token; lengths in tokens")
    for sample in found.samples[:NUM_SHOWN]:
        console.print(Text(f"row {sample.row}", style="bold"))
        for title in ("prompt", "chosen", "base", "tuned"):
            line = f"  {title:<9}{' '.join(getattr(sample, title).split())}"
            console.print(Text(harmless(line)), overflow="ellipsis", no_wrap=True)


def figures(found: Comparison) -> Iterator[tuple[str, str, str, str, str]]:
    """Name, base, tuned, change and unit of every statistic."""
    for line in found.lines:
        yield line.name, written(line.base), written(line.tuned), written(line.change, sign="+"), line.unit
    for kl in found.kl:
        yield f"KL to base, {kl.texts}", "", written(kl.figure), "", "nats/token"
    if found.samples:
        lengths = [[sample.num_tokens[side] for sample in found.samples] for side in (0, 1)]
        base, tuned = (sum(side) / len(side) for side in lengths)
        yield "length of own text", f"{base:.1f}", f"{tuned:.1f}", f"{tuned - base:+.1f}", "tokens"
        cut = [sum(sample.was_cut[side] for sample in found.samples) for side in (0, 1)]
        if any(cut):
            yield "own text cut", str(cut[0]), str(cut[1]), "", f"of {len(found.samples)} prompts"


def written(figure: Figure | None, sign: str = "") -> str:
    """A mean with its standard error, to two digits of that."""
    if figure is None:
        return ""
    if not figure.error:
        return f"{figure.value:{sign}.4g}"
    from math import floor, log10

    digits = max(0, 1 - floor(log10(figure.error)))
    return f"{figure.value:{sign}.{digits}f} ±{figure.error:.{digits}f}"


def page(found: Comparison) -> str:
    """The comparison as HTML."""
    from prefopt.inspection.comparing.picture import draw_pairs
    from prefopt.inspection.comparing.statistics import worst_and_best
    from prefopt.report.page import rendered, vector

    worst, best = worst_and_best(found.scores, NUM_EXTREMES)
    return rendered(
        "compare.html",
        title="Comparison of two models",
        found=found,
        figures=list(figures(found)),
        picture=vector(draw_pairs(found.scores)),
        extremes=(("moved furthest the wrong way", worst), ("moved furthest the right way", best)),
        longest=2000,
    )


def as_json(found: Comparison) -> str:
    """All numbers, as strict JSON."""
    import json
    from dataclasses import asdict

    scores = {name: values.tolist() for name, values in vars(found.scores).items()}
    parts = {name: [asdict(item) for item in getattr(found, name)] for name in ("lines", "kl", "samples")}
    told = {"base": found.base, "tuned": found.tuned, "num_rows": found.num_rows, "remarks": found.remarks}
    return json.dumps({**told, "settings": asdict(found.settings), **parts, "pairs": scores}, indent=1, allow_nan=False)
