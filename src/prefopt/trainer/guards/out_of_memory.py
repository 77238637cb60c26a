"""Memory that runs out makes micro-batches smaller: the same pairs per step, in the same order, with the same result.

The attempt is thrown away with all that it kept, and the step is done again with each of its micro-batches cut in
two, then in four, down to one pair. A step's loss has the denominators of the whole step, so that the cut does not
change it (docs/normalisation.md). Two things are not the same for every cut: dropout masks, which have the shape of a
micro-batch, and the load-balancing loss of a mixture of experts, which is a function of one.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache

from prefopt.scoring.head.buffers import release_buffers
from prefopt.trainer.geometry import Share
from prefopt.trainer.loader import Collate, make_step
from prefopt.types import OptimizerStep, PreferenceBatch

__all__ = [
    "FailedElsewhereError",
    "MicroBatchCut",
    "MicroBatchMemoryError",
    "any_rank",
    "first_line",
    "in_parts",
    "is_out_of_memory",
    "until_it_fits",
]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PHRASES = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED", "PT_DEVMEM Allocation failed")
"""What the `RuntimeError` of a library says that has no class of its own for it."""


class MicroBatchMemoryError(MemoryError):
    """Memory ran out, and a smaller micro-batch is not possible or does not help."""


class FailedElsewhereError(MemoryError):
    """Memory ran out on another rank, so that this one leaves its attempt, too."""


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on some rank; collective, on the hosts alone: no device is waited for."""
    table = torch.tensor(float(flag))
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=host_group(dist.group.WORLD))
    return bool(table)


@cache
def host_group(world: Any) -> Any:
    """All ranks of ``world``, connected by their hosts."""
    return dist.new_group(backend="gloo")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the host has no memory left."""
    if isinstance(error, MicroBatchMemoryError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


@dataclass
class MicroBatchCut:
    """Into how many parts the micro-batches of a pass are cut."""

    advice: Callable[[], str]
    """What to do where there is no smaller micro-batch."""
    parts: int = 1

    def halve(self, what: str, step: OptimizerStep, failure: str) -> None:
        """Cut finer from now on; said in one line.

        Args:
            what: failed, as a message says it.
            step: that failed, before it was cut.
            failure: what the exception said.

        Raises:
            MicroBatchMemoryError: the micro-batches have one pair.
        """
        most = max(step.most_pairs)
        if self.parts >= most:
            raise MicroBatchMemoryError(
                f"There is no memory for {what}, even with one pair in a micro-batch ({failure}). {self.advice()}"
            )
        self.parts *= 2
        logger.warning(
            "Memory ran out in %s (%s). It is done again with micro-batches of at most %d pairs instead of %d; the "
            "pairs of a step, their order and the result stay the same.",
            what,
            failure,
            -(-most // self.parts),
            -(-most // (self.parts // 2)),
        )


def in_parts(step: OptimizerStep, parts: int, collate: Collate) -> OptimizerStep:
    """The step with each micro-batch cut into ``parts``, or into as many as it has pairs on the rank with most.

    Every rank gets as many micro-batches as the others; where it has no pair for one it computes a dummy.

    Args:
        step: as the loader made it.
        parts: of each micro-batch.
        collate: rows and their weight -> the batch.
    """
    if parts == 1:
        return step
    shares, rows = [], {}
    for batch, places, sources, most in zip(
        step.micro_batches, step.places, step.sources, step.most_pairs, strict=True
    ):
        rows |= dict(zip(places, sources, strict=True))
        shares += parts_of(batch, places, min(parts, most), -(-most // parts))
    return make_step(shares, lambda wanted: [rows[place] for place in wanted], collate)


def parts_of(batch: PreferenceBatch, places: Sequence[int], count: int, most_pairs: int) -> Iterator[Share]:
    """``count`` parts of one micro-batch, whose numbers of pairs differ by at most 1."""
    num_pairs = len(places) if batch.num_model_tokens else 0  # a dummy stays one
    for part in range(count):
        own = places[part * num_pairs // count : (part + 1) * num_pairs // count]
        yield Share(own, 1.0, most_pairs) if own else Share(places[:1], 0.0, most_pairs)


def until_it_fits(
    attempt: Callable[[OptimizerStep], Result],
    what: str,
    step: OptimizerStep,
    cut: MicroBatchCut,
    collate: Callable[[], Collate],
    undo: Callable[[], None] = lambda: None,
) -> Result:
    """What ``attempt`` gives of a step, whose micro-batches are cut finer whenever memory runs out.

    Args:
        attempt: computes a step; what it keeps must not outlive its exception.
        what: is computed, as a message says it.
        step: as the loader made it, on the host or on the device.
        cut: of the pass; remembers how fine it has become.
        collate: gives what makes batches of rows; asked for only where some are cut.
        undo: brings back what a failed attempt has changed.

    Raises:
        MicroBatchMemoryError: there is nothing smaller to try.
    """
    while True:
        try:
            return attempt(step if cut.parts == 1 else in_parts(step, cut.parts, collate()))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        # the exception is gone here, and with its traceback the frames that held the activations
        undo()
        release_memory()
        cut.halve(what, step, failure)


def release_memory() -> None:
    """Give back what the failed attempt held: cycles in the graph, and the allocator's cache."""
    release_buffers()
    with torch.enable_grad():  # autograd's queue keeps the rest of a backward pass that failed until the next one
        torch.zeros(1, requires_grad=True).sum().backward()
    gc.collect()
    clear_device_cache()


def first_line(error: BaseException) -> str:
    """What the exception says, without the statistics that follow."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" GPU ")[0].rstrip(". ")
