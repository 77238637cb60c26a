"""From tokenised examples to batches: the layouts, and the collators that TRL's users pass."""

from prefopt.batching.collators import DataCollatorForPreference, DataCollatorForTriplePreference, collated_batch
from prefopt.batching.packed import pack_batch, share_batch
from prefopt.batching.padded import pad_batch
from prefopt.batching.vision import DataCollatorForVisionPreference

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForTriplePreference",
    "DataCollatorForVisionPreference",
    "collated_batch",
    "pack_batch",
    "pad_batch",
    "share_batch",
]
