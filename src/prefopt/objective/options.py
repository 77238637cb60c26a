"""The options of an objective, as every trainer's config hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Method", "ObjectiveOptions"]

Method: TypeAlias = Literal["dpo", "cpo", "tpo"]

USER_NAMES: dict[str, dict[str, str]] = {
    "dpo": {},
    "cpo": {"nll_weight": "cpo_alpha", "gamma": "simpo_gamma"},
    "tpo": {"nll_weight": "tpo_alpha", "gamma": "tpo_l_gamma"},
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What `build_objective` takes."""

    method: Method
    loss_type: str | Sequence[str]
    """One name or several, of ``LOSSES[method]`` (or ``sft`` for DPO)."""
    loss_weights: Sequence[float] | None = None
    """A weight for each name; None: 1 each."""
    beta: float
    """Above 0."""
    label_smoothing: float = 0.0
    """eps in [0, 0.5]; ``robust`` [0, 0.5), ``exo_pair`` (0, 0.5)."""
    f_divergence_type: str = "reverse_kl"
    """DPO: one of `DIVERGENCES`."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of ``alpha_divergence``, as in the f-DPO paper (TRL's is 1 - alpha)."""
    discopop_tau: float = 0.05
    """Above 0."""
    ld_alpha: float | None = None
    """LD-DPO's alpha in [0, 1]; None: off."""
    use_weighting: bool = False
    """WPO: weigh each pair by how likely the policy is to sample it."""
    gamma: float = 0.0
    """Target margin of ``simpo``, ``alphapo`` and ``tpo-l``."""
    nll_weight: float = 0.0
    """CPO, TPO: weight of the NLL of the chosen, of the gold completion."""
    alpha: float = 0.0
    """CPO: AlphaPO's shape of the reward; with another value than 0 every loss takes means per token."""
    bco_shift: bool = False
    """``bco_pair`` with the paper's running reward shift."""
    num_completions: int = 2
    """The most completions that a row ranks, 2 to 8."""
    ranking: str = "all_pairs"
    """How more than two become one loss: one of `RANKINGS`."""

    @property
    def given_names(self) -> tuple[str, ...]:
        """The loss names as the user gave them."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type or ())

    def user_name(self, option: str) -> str:
        """What the user's config calls ``option``."""
        return USER_NAMES.get(self.method, {}).get(option, option)
