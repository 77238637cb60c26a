"""What a quickstart shows: tables for the terminal, and `report.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from prefopt.quickstart.task import ASKS, check, parse
from prefopt.terminal import harmless
from prefopt.trainer.samples import cell

if TYPE_CHECKING:
    from prefopt.quickstart.measure import Measured

__all__ = ["CurvePoint", "Outcome", "answers_text", "examples", "figures_table", "markdown", "next_commands"]

GOAL = 0.9
"""Both shares on held-out requests must end above this."""


@dataclass(frozen=True)
class CurvePoint:
    """A log line of the training: step, mean loss, and share of pairs with the higher reward on the chosen side."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """Everything a quickstart found; `prompts` are those of the held-out rows, times are in seconds."""

    seed: int
    output_dir: Path
    settings: dict[str, Any]
    num_pairs: int
    prompts: tuple[str, ...]
    before: Measured
    after: Measured
    curve: tuple[CurvePoint, ...]
    train_seconds: float
    total_seconds: float

    @property
    def has_risen(self) -> bool:
        """Whether both shares ended above the goal, from below it."""
        ends = (self.after.accuracy, self.after.pass_rate)
        starts = (self.before.accuracy, self.before.pass_rate)
        return min(ends) > GOAL > max(starts)

    @property
    def verdict(self) -> str:
        """One sentence on whether it worked."""
        if self.has_risen:
            return f"The model now does what it is asked: both shares rose above {GOAL:.0%} on requests it never saw."
        return f"It did not work: both shares should start below {GOAL:.0%} and end above it. Please report this."


def examples(prompts: Sequence[str], before: Measured) -> tuple[int, ...]:
    """The rows to show: of each family of requests the first that is answered wrongly before, or else its first."""
    families: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        families.setdefault(list(ASKS).index(parse(prompt).ask) // 2, []).append(row)
    return tuple(
        next((row for row in rows if not check(prompts[row], before.answers[row])), rows[0])
        for _, rows in sorted(families.items())
    )


def figures_table(*columns: tuple[str, Measured]) -> Table:
    """The two shares and the mean log-probs, a column for each measurement."""
    table = Table("on held-out requests", *(name for name, _ in columns), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in _figures([measured for _, measured in columns]):
        table.add_row(*row)
    return table


def answers_text(prompts: Sequence[str], rows: Sequence[int], *columns: tuple[str, Measured]) -> Text:
    """The requests of `rows` and the answers to them, a line for each measurement."""
    text = Text()
    for row in rows:
        request = parse(prompts[row])
        text.append(f"{request.ask}: {' '.join(request.words)}\n", style="bold")
        for name, measured in columns:
            answer = measured.answers[row]
            is_right = check(prompts[row], answer)
            text.append(harmless(f"  {name:<8}{answer.strip()}  "))
            text.append("right\n" if is_right else "wrong\n", style="green" if is_right else "red")
    return text


def next_commands(outcome: Outcome) -> tuple[str, ...]:
    """The same training as a command, on the files that the quickstart leaves."""
    folder, settings = outcome.output_dir, outcome.settings
    options = ("beta", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_length")
    return (
        f"prefopt dpo --model_name_or_path {folder / 'base'} --dataset_name {folder / 'train.jsonl'}",
        f"--output_dir {folder.with_name('my-first-run')}",
        f"--loss_type {' '.join(settings['loss_type'])}",
        f"--loss_weights {' '.join(map(str, settings['loss_weights']))}",
        " ".join(f"--{name} {settings[name]:g}" for name in options),
    )


def markdown(outcome: Outcome) -> str:
    """`report.md`."""
    measured = [outcome.before, outcome.after]
    settings = [(f"`{name}`", f"`{value}`") for name, value in outcome.settings.items()]
    curve = [(str(point.step), f"{point.loss:.3f}", f"{point.accuracy:.3f}") for point in outcome.curve]
    command = " \\\n    ".join(next_commands(outcome))
    sections = (
        f"# prefopt quickstart, seed {outcome.seed}",
        outcome.verdict,
        f"{outcome.num_pairs} generated pairs, {len(outcome.prompts)} held-out requests; training took "
        f"{outcome.train_seconds:.1f} s, everything {outcome.total_seconds:.1f} s.",
        "## Before and after",
        _pipes(("on held-out requests", "before", "after"), _figures(measured)),
        "The first request of each kind that the shipped model answers wrongly:",
        _pipes(("request", "should be", "before", "after"), _answers(outcome, measured)),
        "The first share compares log p of the two answers under the policy alone, without the reference. The "
        "second is of the answers that the model itself generates, checked by a program.",
        "## Training",
        _pipes(("step", "loss", "reward accuracy"), curve),
        _pipes(("option", "value"), settings),
        "## Next",
        f"The same training as a command; put your own model and rows in place of these:\n\n```\n{command}\n```",
    )
    return "\n\n".join(sections) + "\n"


def _figures(measured: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    yield "preferred answer is the likelier", *(f"{each.accuracy:.1%}" for each in measured)
    yield "generated answer is right", *(f"{each.pass_rate:.1%}" for each in measured)
    yield "mean log p(chosen), nats", *(f"{each.chosen_logp:.2f}" for each in measured)
    yield "mean log p(rejected), nats", *(f"{each.rejected_logp:.2f}" for each in measured)


def _answers(outcome: Outcome, measured: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    prompts = outcome.prompts
    for row in examples(prompts, outcome.before):
        request = parse(prompts[row])
        yield (
            cell(f"{request.ask}: {' '.join(request.words)}"),
            cell(request.right.strip()),
            *(cell(_judged(prompts[row], each.answers[row])) for each in measured),
        )


def _judged(prompt: str, answer: str) -> str:
    return f"{answer.strip()} ({'right' if check(prompt, answer) else 'wrong'})"


def _pipes(headers: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
