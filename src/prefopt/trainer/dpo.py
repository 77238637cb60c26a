"""Direct preference optimisation."""

from __future__ import annotations

from typing import ClassVar

from prefopt.trainer.base import PreferenceTrainer
from prefopt.trainer.config import DPOConfig

__all__ = ["DPOTrainer"]


class DPOTrainer(PreferenceTrainer):
    """DPO and its relatives (15 losses): the policy is compared with a reference on pairs of completions.

    The arguments and their order are those of `PreferenceTrainer`, which are TRL's.

    Example:
        >>> from datasets import Dataset
        >>> from prefopt import DPOConfig, DPOTrainer
        >>> rows = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}]
        >>> trainer = DPOTrainer(
        ...     "path/or/name", args=DPOConfig("out"), train_dataset=Dataset.from_list(rows)
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    References:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
    """

    method: ClassVar[str] = "dpo"
    config_class = DPOConfig
