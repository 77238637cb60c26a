"""Contrastive preference optimisation, SimPO, CPO-SimPO, AlphaPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import TrainerCallback

from prefopt.trainer.base import PreferenceTrainer
from prefopt.trainer.config import CPOConfig

__all__ = ["CPOTrainer"]


class CPOTrainer(PreferenceTrainer):
    """CPO and its relatives: pairs of completions without a reference, plus the NLL of the chosen one.

    The arguments are those of `PreferenceTrainer`, in TRL's order.

    References:
        Xu et al., Contrastive Preference Optimization, arXiv:2401.08417.
        Meng et al., SimPO, arXiv:2405.14734.
        Gupta et al., AlphaPO, arXiv:2501.03884.
    """

    method: ClassVar[str] = "cpo"
    config_class = CPOConfig

    def __init__(
        self,
        model: Any = None,
        args: CPOConfig | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        *,
        quantization_config: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            quantization_config=quantization_config,
            tokenizer=tokenizer,
        )
