"""Which kernel computes the segments of a row.

========== ==================================================== =======================================================
name       what it is                                           for
========== ==================================================== =======================================================
flash      the package flash-attn                               CUDA, 16 bits; soft caps, windows, dropout
varlen     ``torch.nn.attention.varlen``, in torch itself       CUDA, 16 bits; windows
flex       FlexAttention, compiled                              CUDA; soft caps, windows, sinks
segments   the model's own attention, a call per segment        everything else, and the CPU
========== ==================================================== =======================================================

They agree with each other to rounding. The first use of a kernel on a kind of call is a trial of a small row, output
and gradients: one that raises or differs is left with a warning, and the next is taken.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from prefopt.scoring.attention.flex import attend_flex, flex_obstacle
from prefopt.scoring.attention.options import Case, LayerOptions
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.attention.trial import fault_of
from prefopt.scoring.attention.varlen import attend_flash, attend_varlen, flash_obstacle, varlen_obstacle

__all__ = ["BACKENDS", "VARIABLE", "Backend", "backend_for"]

logger = logging.getLogger(__name__)

VARIABLE = "PREFOPT_ATTENTION"
"""The environment variable that names a backend, which is then used or the run stops."""
SEGMENTS = "segments"


@dataclass(frozen=True)
class Backend:
    """A kernel for whole rows."""

    attend: Callable[[Tensor, Tensor, Tensor, Plan, LayerOptions], Tensor]
    """query [1, heads, S, D], key and value [1, kv_heads, S, D] -> [1, S, heads, D]."""
    obstacle: Callable[[Case], str | None]
    """Why it cannot compute a kind of call; None where it can."""


BACKENDS = {
    "varlen": Backend(attend_varlen, varlen_obstacle),
    "flash": Backend(attend_flash, flash_obstacle),
    "flex": Backend(attend_flex, flex_obstacle),
}


def backend_for(name: str, case: Case) -> Backend | None:
    """The kernel for a kind of call; None: segment by segment.

    Args:
        name: of the attention implementation that the model has.
        case: the call.

    Raises:
        ValueError: ``PREFOPT_ATTENTION`` names what does not exist, or cannot compute this.
    """
    if forced := os.environ.get(VARIABLE):
        return forced_backend(forced, case)
    if case.device.type != "cuda":
        return None
    return next((BACKENDS[backend] for backend in preferred(name, case) if is_usable(backend, case)), None)


def preferred(name: str, case: Case) -> tuple[str, ...]:
    """Kernels in the order in which they are tried; the one that the user's implementation has comes first."""
    if case.softcap or case.sinks:
        return ("flash", "flex")
    return ("flash", "varlen") if "flash" in name else ("varlen", "flash")


def forced_backend(name: str, case: Case) -> Backend | None:
    if name == SEGMENTS:
        return None
    if name not in BACKENDS:
        known = ", ".join([*BACKENDS, SEGMENTS])
        raise ValueError(f"{VARIABLE}={name} names no attention backend. Set it to one of {known}, or unset it.")
    if reason := obstacle(name, case) or fault(name, case):
        raise ValueError(f"{VARIABLE}={name}: {reason}. Unset it, and a backend is chosen that can compute this model.")
    return BACKENDS[name]


@cache
def is_usable(name: str, case: Case) -> bool:
    """Whether a kernel can compute a kind of call; a warning where it should and does not."""
    if obstacle(name, case) is not None:
        return False
    reason = fault(name, case)
    if reason:
        logger.warning("The attention backend %s is not used: %s", name, reason)
    return reason is None


def obstacle(name: str, case: Case) -> str | None:
    """Why a kernel is not for this kind of call."""
    if case.unknown:
        return f"only the model's own attention knows what to do with {', '.join(case.unknown)}"
    if case.blocks:
        return "its mask is causal, and the tokens of an image see each other in both directions"
    try:
        return BACKENDS[name].obstacle(case)
    except ImportError as error:
        return f"it is not installed ({error})"


@cache
def fault(name: str, case: Case) -> str | None:
    """What is wrong with a kernel on this machine, found once by a trial."""
    return fault_of(BACKENDS[name].attend, case)
