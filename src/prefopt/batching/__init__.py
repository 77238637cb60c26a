"""From tokenised examples to batches: the layouts, how a step is cut, and the collators that TRL's users pass."""

from prefopt.batching.budget import TokenBudget
from prefopt.batching.collators import DataCollatorForPreference, DataCollatorForTriplePreference, collated_batch
from prefopt.batching.encoder_decoder import encoder_decoder_batch
from prefopt.batching.lengths import GroupLengths, lengths_of_rows, lengths_of_set
from prefopt.batching.packed import pack_batch, share_batch
from prefopt.batching.padded import pad_batch
from prefopt.batching.vision import DataCollatorForVisionPreference

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForTriplePreference",
    "DataCollatorForVisionPreference",
    "GroupLengths",
    "TokenBudget",
    "collated_batch",
    "encoder_decoder_batch",
    "lengths_of_rows",
    "lengths_of_set",
    "pack_batch",
    "pad_batch",
    "share_batch",
]
