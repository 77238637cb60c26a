"""Triple preference optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import TrainerCallback

from prefopt.trainer.base import PreferenceTrainer
from prefopt.trainer.config import TPOConfig

__all__ = ["TPOTrainer"]


class TPOTrainer(PreferenceTrainer):
    """TPO and TPO-L: pairs of completions without a reference policy, plus the NLL of a gold completion.

    The gold completion is the column ``reference``; with ``tpo_alpha=0`` it is neither computed nor needed. The
    arguments are those of `PreferenceTrainer`, in TRL's order.

    References:
        Saeidi et al., Triple Preference Optimization, arXiv:2405.16681.
    """

    method: ClassVar[str] = "tpo"
    config_class = TPOConfig

    def __init__(
        self,
        model: Any = None,
        args: TPOConfig | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        model_init: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            model_init=model_init,
            quantization_config=quantization_config,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            tokenizer=tokenizer,
        )
