"""A reference that does not move gives a pair the same log-probs for ever: it is asked once for each."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.files import remove_tree
from prefopt.reference.cache import FOLDER, ReferenceCache, Values, write_shard
from prefopt.reference.policy import ModelReference, ReferencePolicy, stats_of_sums
from prefopt.types import PAIR, Branch, PreferenceBatch, SequenceStats

__all__ = ["Remembered"]

logger = logging.getLogger(__name__)

MOST_SCORED = 1024
"""Micro-batches whose log-probs may wait on the device, where each takes a block of memory of its own."""
UNKNOWN: Values = (math.nan, math.nan)


class Scored(NamedTuple):
    """What the source gave for a micro-batch."""

    rows: tuple[int, ...]
    keys: tuple[bytes, ...]
    sums: Tensor
    """[2, P] log p of chosen and rejected, on the device, nats, float32."""


class Remembered(ReferencePolicy):
    """Looks up the log-probs of pairs that ``source`` has scored before, in this run or an earlier one.

    A micro-batch whose pairs are all known costs no forward pass; any other is scored as a whole. The first value that
    a pair was given stays its value, since another batch may round it differently. Nothing waits for the device before
    `settle`, unless a pair comes again until then.

    Args:
        source: weights that do not change within a run; between two runs they may (`begin`).
    """

    def __init__(self, source: ModelReference) -> None:
        self.source: ModelReference = source
        self.derives_from_policy = source.derives_from_policy
        self.settings: Mapping[str, object] = {}
        self.cache: ReferenceCache | None = None
        self.is_open = self.is_off = False
        self.probe = b""
        """Of the weights whose log-probs are remembered."""
        self.scored: list[Scored] = []
        self.waiting: set[bytes] = set()
        """The keys in ``scored``."""
        self.complaint: str | None = None
        """About the first log-prob that was not finite; such a pair is not remembered."""

    def begin(self, **settings: object) -> None:
        """A run begins: with the first batch that has keys, the weights are looked at anew and the cache is read.

        Args:
            settings: what decides the numbers beside the weights, as for `fingerprint`.
        """
        self.settings, self.is_open, self.is_off = settings, False, False

    def opened(self) -> ReferenceCache:
        """The cache of what ``source`` is in this run.

        Raises:
            ValueError: the weights have no fingerprint.
        """
        if self.cache is not None and self.is_open:
            return self.cache
        reference = self.source.fingerprint(**self.settings)
        if self.cache is not None and self.cache.reference == reference:
            self.cache.reload()
        else:
            self.cache, self.scored, self.waiting = ReferenceCache(None, reference), [], set()
        self.is_open, self.probe = True, self.source.probe()
        logger.info("The cache has the log-probs of %d pairs under this reference.", len(self.cache))
        return self.cache

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Mapping[Branch, SequenceStats]:
        keys = batch.keys
        if keys is None or not self.ready():
            return self.source(batch)
        known = self.known(keys)
        if None not in known:
            sums = as_tensor(known, batch)
        else:
            stats = self.source(batch)
            sums = torch.stack([stats[branch].sum_logps for branch in PAIR]).float()
            if any(known):
                given = as_tensor(known, batch)
                sums = torch.where(given.isnan(), sums, given)
            if batch.num_model_tokens:  # no dummy
                self.scored.append(Scored(batch.rows, keys, sums))
                self.waiting.update(keys)
        return stats_of_sums(dict(zip(PAIR, sums, strict=True)), batch)

    def ready(self) -> bool:
        """Whether log-probs can be remembered: weights that are not there (offloaded) have no fingerprint."""
        if not self.is_off:
            try:
                self.opened()
            except ValueError as error:
                logger.warning("The reference is computed anew in every epoch. %s", error)
                self.is_off = True
        return not self.is_off

    def known(self, keys: Sequence[bytes]) -> list[Values | None]:
        """What is known of each pair."""
        cache = self.opened()
        if len(self.scored) >= MOST_SCORED or not self.waiting.isdisjoint(keys):
            self.settle()
        return [cache.values.get(key) for key in keys]

    def settle(self) -> None:
        """Bring what was scored to the host, in one transfer, and into the cache."""
        if not self.scored:
            return
        assert self.cache is not None
        pairs = [pair for scored in self.scored for pair in zip(scored.keys, scored.rows, strict=True)]
        sums = torch.cat([scored.sums for scored in self.scored], dim=1).T.tolist()
        entries: dict[bytes, Values] = {}
        for (key, row), values in zip(pairs, map(tuple, sums), strict=True):
            if not all(map(math.isfinite, values)):
                self.complaint = self.complaint or not_finite(row, values)
            elif key not in self.cache:
                entries.setdefault(key, values)
        self.cache.put(entries)
        self.scored, self.waiting = [], set()

    def take(self) -> tuple[dict[bytes, Values], str | None]:
        """What was scored since the last time, to be given to every rank's cache and its disk; and the complaint.

        Raises:
            ValueError: the weights have changed in the run.
        """
        if self.is_open and self.source.probe() != self.probe:
            raise ValueError(
                "The reference's weights have changed during the run, but its log-probs are looked up as if they had "
                "not. Let it follow the policy by `sync_ref_model` or `BEMACallback(update_ref_model=True)`, or set "
                "the environment variable PREFOPT_CACHE to `off`: then every batch is computed when it comes."
            )
        self.settle()
        complaint, self.complaint = self.complaint, None
        return {} if self.cache is None else self.cache.take(), complaint

    def save(self, folder: str | PathLike[str]) -> None:
        """Write all that is known into a checkpoint's folder.

        Raises:
            OSError: it could not be written, and the checkpoint with it.
        """
        remove_tree(Path(folder, FOLDER))  # of a run before, into the same folder
        if self.cache is not None and self.cache.values:
            write_shard(Path(folder, FOLDER, self.cache.reference), self.cache.values, self.cache.reference)

    def load(self, folder: str | PathLike[str]) -> None:
        """Continue with what `save` wrote: with the very values of the run that is resumed, whatever the cache has."""
        if self.ready():
            cache = self.opened()
            cache.values.update(ReferenceCache(folder, cache.reference).values)


def as_tensor(values: Sequence[Values | None], batch: PreferenceBatch) -> Tensor:
    """[2, P] float32 on the batch's device; NaN where a pair is not known."""
    table = torch.tensor([pair or UNKNOWN for pair in values], dtype=torch.float32)
    return table.T.to(batch.pair_weights.device, non_blocking=True)


def not_finite(row: int, values: Values) -> str:
    return (
        f"The reference gives row {row} the log-probs {values} (chosen, rejected), against which nothing can be "
        "trained. Look for NaN in its weights, or compute in bfloat16 or float32 instead of float16."
    )
