"""Data preparation (templates, tokens, truncation): rows per second of prefopt against TRL 1.16.

    python benchmarks/prepare.py --data rows.jsonl --tokenizers path/to/one path/to/another

Both sides prepare the same rows in memory, in one process and on one thread, in turn, with no cache; the first round is
not timed. Rows: as they are; as conversations with a chat template; several pairs of each prompt; long prompts; and
with accents in nearly every word, which leaves prefopt few words to look up.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from results import ratio, write_result
from workload import read_rows

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For tokenizers without a chat template."""

PAIRS_PER_PROMPT = 4
ACCENTS = str.maketrans("aeiou", "áéíóú")

Row = dict[str, Any]
Prepare = Callable[[Any, Any], Any]
"""Data set and tokenizer -> the prepared set."""


def main() -> None:
    args = arguments()
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # read when tokenizers is first imported
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    rows = read_rows(args.data)[: args.rows]
    kinds = {"text": rows, "chat": chat(rows), "repeated prompts": repeated(rows), "long prompts": long(rows)}
    kinds["accented"] = [{column: text.translate(ACCENTS) for column, text in row.items()} for row in rows]
    sides = {"prefopt": prefopt_prepare(args.max_length), "trl": trl_prepare(args.max_length)}
    measured: dict[str, dict[str, Any]] = {}
    for path in args.tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = tokenizer.chat_template or CHATML
        name = f"{path.name} ({len(tokenizer)} tokens)"
        measured[name] = {}
        for kind, of_kind in kinds.items():
            measured[name][kind] = measure(of_kind, tokenizer, sides, args.repeats)
            print(line(name, kind, measured[name][kind]), flush=True)
    write_result("prepare", {"max_length": args.max_length, "threads": 1, "tokenizers": measured})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    return parser.parse_args()


def chat(rows: list[Row]) -> list[Row]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{column: [{"role": roles[column], "content": text}] for column, text in row.items()} for row in rows]


def repeated(rows: list[Row]) -> list[Row]:
    """As many rows, each prompt with several pairs one after another."""
    return [{**row, "prompt": rows[i // PAIRS_PER_PROMPT]["prompt"]} for i, row in enumerate(rows)]


def long(rows: list[Row]) -> list[Row]:
    """The completions of other rows stand before the prompt; two thirds of the characters are then the prompt's."""
    others = rows[1:] + rows[:1]
    return [
        {**row, "prompt": f"{other['chosen']}\n{other['rejected']}\n{row['prompt']}"}
        for row, other in zip(rows, others, strict=True)
    ]


def prefopt_prepare(max_length: int) -> Prepare:
    from prefopt.data import PrepareOptions, prepare_dataset

    options = PrepareOptions(("chosen", "rejected"), max_length, "keep_start")
    return lambda dataset, tokenizer: prepare_dataset(dataset, tokenizer, options, name="train")


def trl_prepare(max_length: int) -> Prepare:
    """TRL's own step. It truncates later, while it collates."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(tempfile.mkdtemp(), max_length=max_length, use_cpu=True, bf16=False)

    def prepare(dataset: Any, tokenizer: Any) -> Any:
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)  # all that the method asks of its trainer
        return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, config, "train")

    return prepare


def measure(rows: list[Row], tokenizer: Any, sides: dict[str, Prepare], repeats: int) -> dict[str, Any]:
    """Rows per second of each side, by processor time and by the clock."""
    from datasets import Dataset

    dataset = Dataset.from_list(rows)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(repeats + 1):
        for side, prepare in sides.items():
            start = time.process_time(), time.perf_counter()
            prepared = prepare(dataset, tokenizer)
            seconds[side].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu, wall = ({side: [len(rows) / pair[i] for pair in of[1:]] for side, of in seconds.items()} for i in (0, 1))
    lengths = [len(ids) for column in ("prompt_ids", "chosen_ids", "rejected_ids") for ids in prepared[column]]
    return {
        "rows": len(rows),
        "tokens_per_row": round(sum(lengths) / len(prepared)),
        "rows_per_cpu_second": {side: statistics.median(of) for side, of in cpu.items()},
        "rows_per_second": {side: statistics.median(of) for side, of in wall.items()},
        "speedup": {"cpu": ratio(cpu["prefopt"], cpu["trl"]), "wall": ratio(wall["prefopt"], wall["trl"])},
        "runs": {"cpu": cpu, "wall": wall},
    }


def line(name: str, kind: str, result: dict[str, Any]) -> str:
    cpu = result["rows_per_cpu_second"]
    return (
        f"{name:24} {kind:17} {result['rows']} rows of {result['tokens_per_row']:5} tokens  "
        f"prefopt {cpu['prefopt']:6.0f}  trl {cpu['trl']:6.0f} rows/CPU s  "
        f"{result['speedup']['cpu']:5.2f}x (by the clock {result['speedup']['wall']:.2f}x)"
    )


if __name__ == "__main__":
    main()
