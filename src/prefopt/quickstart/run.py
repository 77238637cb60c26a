"""`prefopt quickstart`: DPO on a small shipped model and generated preferences, before and after.

With the DPO loss alone the two log-probs fall together: every pair is won, but a model as small as this one forgets how
to answer. The `sft` term keeps the chosen answers likely, so that the generated ones become right as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prefopt.quickstart import ASSETS
from prefopt.quickstart.report import (
    CurvePoint,
    Outcome,
    answers_text,
    examples,
    figures_table,
    markdown,
    next_commands,
)
from prefopt.quickstart.task import preference_set
from prefopt.report.folder import REPORT
from prefopt.terminal import without_bars

if TYPE_CHECKING:
    from datasets import Dataset

    from prefopt.quickstart.measure import Measured

__all__ = ["SETTINGS", "run"]

SETTINGS: dict[str, Any] = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 1.0],
    "beta": 0.5,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3.0,
    "max_length": 64,
    "gradient_checkpointing": False,
    "bf16": False,
}
"""Options of `DPOConfig` that differ from the defaults: a model this small takes a large learning rate."""

_INTRODUCTION = (
    "A small model (270,000 parameters, shipped with the package) can sort, repeat and rewrite words, but picks the "
    "way to do it at random, whatever it is asked. DPO on {num_pairs} generated pairs teaches it to listen. The "
    "figures are for {num_held_out} held-out requests: no training, of the shipped model or here, saw their words "
    "together."
)


def run(
    seed: int = 0,
    output_dir: str | Path = "runs/quickstart",
    *,
    num_pairs: int = 3000,
    num_held_out: int = 300,
    console: Console | None = None,
) -> Outcome:
    """Measures the shipped model, trains it with DPO, measures it again, prints and writes `report.md`.

    Args:
        seed: of the pairs, of the held-out requests and of the training.
        output_dir: everything is written here: `base/`, `model/`, `train.jsonl`, `held_out.jsonl`, `report.md`.
        num_pairs: pairs to train on.
        num_held_out: requests to measure with; at least six.
        console: where to print; None: the terminal, or plain text where there is none.

    Returns:
        What was measured; `Outcome.has_risen` says whether it worked.
    """
    start = time.perf_counter()
    console, folder = console or Console(), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(_INTRODUCTION.format(num_pairs=num_pairs, num_held_out=num_held_out))
    with _small_work():
        outcome = _measured_training(seed, folder, num_pairs, num_held_out, start, console)
    (folder / "report.md").write_text(markdown(outcome), encoding="utf-8")
    _print_ending(outcome, console)
    return outcome


def _measured_training(
    seed: int, folder: Path, num_pairs: int, num_held_out: int, start: float, console: Console
) -> Outcome:
    from prefopt.quickstart.measure import measure

    train = preference_set("train", num_pairs, seed=seed)
    held_out = preference_set("held_out", num_held_out, seed=seed)
    model, tokenizer = _load()
    _write_inputs(folder, train, held_out, model, tokenizer)
    prompts = tuple(held_out["prompt"])
    before = measure(model, tokenizer, held_out)
    _print_measured(prompts, before, console, ("before", before))
    trainer = _make_trainer(seed, folder / "model", train, model, tokenizer, console)
    train_start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - train_start
    trainer.save_model()
    after = measure(model, tokenizer, held_out)
    return Outcome(
        seed=seed,
        output_dir=folder,
        settings=SETTINGS,
        num_pairs=num_pairs,
        prompts=prompts,
        before=before,
        after=after,
        curve=_curve(trainer.state.log_history),
        train_seconds=train_seconds,
        total_seconds=time.perf_counter() - start,
    )


def _load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(ASSETS), AutoTokenizer.from_pretrained(ASSETS)


def _write_inputs(folder: Path, train: Dataset, held_out: Dataset, model: Any, tokenizer: Any) -> None:
    """What the same training from the command line needs."""
    train.to_json(folder / "train.jsonl")
    held_out.to_json(folder / "held_out.jsonl")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def _make_trainer(seed: int, folder: Path, train: Dataset, model: Any, tokenizer: Any, console: Console) -> Any:
    from transformers import PrinterCallback, TrainerCallback

    from prefopt import DPOConfig, DPOTrainer

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for point in _curve([{**(logs or {}), "step": state.global_step}]):
                step = f"step {point.step:4d} of {state.max_steps}"
                console.print(f"{step}   loss {point.loss:.3f}   reward accuracy {point.accuracy:.3f}", highlight=False)

    config = DPOConfig(
        str(folder), seed=seed, logging_steps=25, save_strategy="no", report_to="none", disable_tqdm=True, **SETTINGS
    )
    trainer = DPOTrainer(model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=[Lines()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def _curve(log_history: Sequence[dict[str, Any]]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(log["step"], log["loss"], log["rewards/accuracies"]) for log in log_history if "loss" in log
    )


def _print_ending(outcome: Outcome, console: Console) -> None:
    columns = ("before", outcome.before), ("after", outcome.after)
    _print_measured(outcome.prompts, outcome.before, console, *columns)
    console.print(outcome.verdict, style="bold green" if outcome.has_risen else "bold red")
    model = outcome.output_dir / "model"
    curves = f"Training       {model / REPORT}\n" if (model / REPORT).is_file() else ""
    console.print(
        f"\nTrained model  {model}\nReport         {outcome.output_dir / 'report.md'}\n{curves}"
        f"Time           {outcome.total_seconds:.1f} s, of which training {outcome.train_seconds:.1f} s\n\n"
        "Next: the same as a command; put your own model and rows in place of these.\n",
        highlight=False,
    )
    console.print("  " + " \\\n    ".join(next_commands(outcome)), highlight=False, soft_wrap=True)


def _print_measured(
    prompts: tuple[str, ...], before: Measured, console: Console, *columns: tuple[str, Measured]
) -> None:
    console.print(figures_table(*columns))
    console.print("The first request of each kind that the shipped model answers wrongly:\n")
    console.print(answers_text(prompts, examples(prompts, before), *columns), highlight=False)


@contextmanager
def _small_work() -> Iterator[None]:
    """No bars for loading and tokenising, which take a moment, and one thread.

    A second thread saves nothing on matrices of this size, and costs minutes where other programs need the cores.
    """
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_bars():
            yield
    finally:
        torch.set_num_threads(num_threads)
