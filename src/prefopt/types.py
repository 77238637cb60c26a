"""The nouns of prefopt: what flows between the stages, with shapes and units.

Shapes are written with these letters everywhere in the package:

====== =====================================================================
P      pairs of a micro-batch
B      branches: completions of a pair that are computed (2, or 3 with gold)
R, T   rows and padded length of a padded batch (a packed batch is ``R = 1``)
N      completion tokens that are scored, over all branches and pairs
V, H   vocabulary, hidden size
====== =====================================================================

Log-probabilities are natural logarithms (nats), float32. Rewards have no unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Branch: TypeAlias = Literal["chosen", "rejected", "gold", "rank_3", "rank_4", "rank_5", "rank_6", "rank_7", "rank_8"]
Message: TypeAlias = dict[str, Any]
Segment: TypeAlias = tuple[int, int, int, int]
"""``(start, end, prefix_start, prefix_end)``: tokens start..end of a row see the prefix and, causally, themselves.

After the segments of a row may come *blocks* ``(start, end, -1, -1)``: these tokens also see each other forwards.
"""

PAIR: tuple[Branch, Branch] = ("chosen", "rejected")
TRIPLE: tuple[Branch, Branch, Branch] = ("chosen", "rejected", "gold")

RANKS: tuple[Branch, ...] = (*PAIR, "rank_3", "rank_4", "rank_5", "rank_6", "rank_7", "rank_8")
"""The completions of a ranking, best to worst; a pair is a ranking of two."""

COLUMN_OF_BRANCH: dict[Branch, str] = {**{rank: rank for rank in RANKS}, "gold": "reference"}
"""The dataset column a branch comes from; TRL's column for the gold completion is ``reference``."""

Statistic: TypeAlias = Literal["entropy", "mean_logit", "is_top1", "log_sum_sq_prob"]
"""A token statistic beyond the log-probability, computed only when asked for."""


@dataclass(frozen=True)
class PreferenceExample:
    """One row as the user gave it, after its format was recognised."""

    row: int
    """Row number in the user's data set, from 0: every message about the row names it."""
    prompt: str | list[Message]
    completions: Mapping[Branch, str | list[Message]]
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ref_sum_logps: Mapping[Branch, float] | None = None
    """Reference log-probs the user supplies with the data (nats, summed over the completion)."""
    images: Mapping[Branch, Sequence[Any]] = field(default_factory=dict)
    """branch -> the images of its prompt and completion, in the order of their places; empty where there are none."""

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class TokenizedExample:
    """One row as token ids; ``loss_masks[branch][t]`` says whether completion token ``t`` is trained on."""

    row: int
    prompt_ids: Sequence[int]
    completion_ids: Mapping[Branch, Sequence[int]]
    loss_masks: Mapping[Branch, Sequence[bool]]
    prompt_starts: Mapping[Branch, int] = field(default_factory=dict)
    """Index of the first prompt token a branch keeps; 0 where absent. Truncation at the start sets it per branch."""
    ref_sum_logps: Mapping[Branch, float] | None = None
    images: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """``prompt`` or a branch -> its images, in the order in which their tokens stand in its ids."""
    weight: float | None = None
    """How often the pair counts in the loss; None: once."""
    target_margin: float | None = None
    """What the difference of the two rewards should exceed, no unit; None: 0."""


@dataclass(frozen=True)
class BranchLayout:
    """Which of the N scored tokens belongs to which completion.

    Scored tokens stand in one order in every batch layout: by branch, then by pair, then by position.
    Completion ``branch_index * P + pair`` is sequence number ``s``; its tokens are contiguous.
    """

    branches: tuple[Branch, ...]
    num_pairs: int
    lengths: tuple[int, ...]
    """[B * P] scored tokens of each sequence, on the host: slicing costs no synchronisation."""
    num_tokens: Tensor
    """[B * P] the same, on the device, int64."""
    sequence_index: Tensor
    """[N] sequence number of each scored token, int64."""
    position: Tensor
    """[N] place of each scored token within its sequence, from 0, int64."""

    def token_slice(self, branch: Branch) -> slice:
        """Where the tokens of ``branch`` stand among the N."""
        first = self.branches.index(branch) * self.num_pairs
        start = sum(self.lengths[:first])
        return slice(start, start + sum(self.lengths[first : first + self.num_pairs]))

    def sequence_slice(self, branch: Branch) -> slice:
        """Where the sequences of ``branch`` stand among the B * P."""
        first = self.branches.index(branch) * self.num_pairs
        return slice(first, first + self.num_pairs)

    def pair_index(self, branch: Branch) -> Tensor:
        """[n_branch] the pair each token of ``branch`` belongs to."""
        return self.sequence_index[self.token_slice(branch)] % self.num_pairs


@dataclass(frozen=True)
class PreferenceBatch:
    """One micro-batch: what the model is given, and which of its positions predict which completion token."""

    model_inputs: Mapping[str, Tensor]
    """Keyword arguments of the model's forward: ``input_ids`` [R, T] and what the layout adds."""
    predict_from: Tensor
    """[N] flat index into R * T of the position whose output predicts the token (of an encoder-decoder model: R * T of
    its ``labels``), int64."""
    targets: Tensor
    """[N] token ids, int64."""
    layout: BranchLayout
    pair_weights: Tensor
    """[P] float32; 1 for a pair, 0 for a dummy that keeps ranks in step."""
    rows: tuple[int, ...]
    """[P] row numbers in the user's data set (-1 where unknown)."""
    num_model_tokens: int
    """Tokens as TRL counts them: the prompt once per completion, no padding, no dummies."""
    ref_sum_logps: Mapping[Branch, Tensor] | None = None
    """branch -> [P] reference log-probs that came with the data or from the cache, nats."""
    keys: tuple[bytes, ...] | None = None
    """[P] the content of each pair in 16 bytes, by which a reference remembers it; None: it is not remembered."""
    segments: tuple[Segment, ...] | None = None
    """K segments and blocks of a packed row: the content of its ``attention_mask``, on the host."""
    row_weights: Tensor | None = None
    """[P] float32; how often each pair counts in the loss, as its row says; None: once each."""
    target_margins: Tensor | None = None
    """[P] float32; what is subtracted from each pair's difference of rewards, no unit; None: 0."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The batch with every tensor on ``device``."""
        return move(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """The batch in pinned memory (called by ``DataLoader``)."""
        return move(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class OptimizerStep:
    """What one rank computes for one optimizer step: one item of the training loader."""

    micro_batches: tuple[PreferenceBatch, ...]
    places: tuple[tuple[int, ...], ...]
    """For each micro-batch, where its pairs stand among those of the step on all ranks, in the order of the set."""
    sources: tuple[list[Mapping[str, Any]], ...]
    """For each micro-batch, the prepared rows that it was made of, from which smaller ones can be made."""
    most_pairs: tuple[int, ...]
    """For each micro-batch, the most pairs that any rank runs at the same time: known to all ranks alike."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> OptimizerStep:
        return move(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> OptimizerStep:
        return move(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the N scored tokens, flat, float32."""

    logps: Tensor
    """[N] log pi(y_t | x, y_<t), nats."""
    entropy: Tensor | None = None
    """[N] entropy of the predicted distribution, nats; detached."""
    mean_logit: Tensor | None = None
    """[N] mean of the logits over the vocabulary; detached."""
    is_top1: Tensor | None = None
    """[N] whether the token has the highest logit, bool."""
    log_sum_sq_prob: Tensor | None = None
    """[N] log sum_v pi(v)^2, nats; detached."""


@dataclass(frozen=True)
class Scores:
    """What a forward pass of a model over a batch gives."""

    tokens: TokenStats
    aux_loss: Tensor | None = None
    """Scalar: the mixture-of-experts load-balancing loss, where the model has one and it was asked for."""


@dataclass(frozen=True)
class SequenceStats:
    """Statistics of the P completions of one branch."""

    sum_logps: Tensor
    """[P] log p(y): sum of the token log-probs (with LD-DPO's weights where they are on), nats."""
    num_tokens: Tensor
    """[P] |y|, scored completion tokens, float32."""
    token_logps: Tensor | None = None
    """[n] token log-probs of all P completions one after another, unweighted; policy only."""
    log_weight: Tensor | None = None
    """[P] log of WPO's weight w(y); detached; policy only, where asked for."""

    @property
    def mean_logps(self) -> Tensor:
        """[P] log p(y) / |y|; 0 for an empty completion (a dummy)."""
        return self.sum_logps / self.num_tokens.clamp(min=1)


Unit: TypeAlias = Literal["pair", "token", "micro_batch"]


@dataclass(frozen=True)
class LossTerm:
    """One term of an objective, unreduced. ``normalise`` turns it into weight * mean over the step's units."""

    name: str
    values: Tensor
    """[P] for unit ``pair``, [n] for unit ``token`` of ``branch``, [] for ``micro_batch``."""
    unit: Unit
    weight: float = 1.0
    branch: Branch | None = None


@dataclass(frozen=True)
class LossTerms:
    """All terms of a micro-batch, and what the log shows of the pairs; the latter are detached."""

    terms: tuple[LossTerm, ...]
    rewards: Mapping[Branch, Tensor]
    """chosen, rejected -> [P] beta times the score, no unit."""
    logps: Mapping[Branch, Tensor]
    """chosen, rejected -> [P] log p as the first loss uses it (a sum, or a mean per token), nats."""


@dataclass(frozen=True)
class StepCounts:
    """Denominators of one optimizer step, over all its micro-batches and ranks (0-d tensors or numbers).

    A pair and its tokens count as often as their row's weight says.
    """

    num_pairs: Tensor | float
    num_tokens: Mapping[Branch, Tensor | float]
    num_micro_batches: Tensor | float


def move(value: Any, function: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in it, through dataclasses, mappings and tuples."""
    if hasattr(value, "detach"):
        return function(value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: move(getattr(value, f.name), function) for f in fields(value)})
    if isinstance(value, Mapping):
        return {key: move(item, function) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(move(item, function) for item in value)
    return value
