"""The reference policy, what it is made of, and the cache of its log-probs."""

from prefopt.reference.cache import ReferenceCache, cache_folder
from prefopt.reference.fingerprints import fingerprint
from prefopt.reference.identity import check_identity
from prefopt.reference.make import make_reference
from prefopt.reference.moving_average import (
    BEMASchedule,
    BEMAState,
    divided_like,
    follow,
    part_of,
    soft_update,
)
from prefopt.reference.policy import ModelReference, Precomputed, ReferencePolicy
from prefopt.reference.precompute import missing_rows, row_key, row_keys, with_reference_logps
from prefopt.reference.remembered import Remembered
from prefopt.reference.weights import named_weights, swapped

__all__ = [
    "BEMASchedule",
    "BEMAState",
    "ModelReference",
    "Precomputed",
    "ReferenceCache",
    "ReferencePolicy",
    "Remembered",
    "cache_folder",
    "check_identity",
    "divided_like",
    "fingerprint",
    "follow",
    "make_reference",
    "missing_rows",
    "named_weights",
    "part_of",
    "row_key",
    "row_keys",
    "soft_update",
    "swapped",
    "with_reference_logps",
]
