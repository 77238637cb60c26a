"""The trainer under the three public ones: transformers' trainer with preference data, a reference and an objective.

Everything that is not about preferences (optimizers, schedulers, distribution, trackers, callbacks) is transformers'
and accelerate's. `PreferenceTrainer` stands on a chain of classes, each with one subject, from theirs up:

====================================== ==========================================================================
class                                  subject
====================================== ==========================================================================
`StatesTrainer`                        what a checkpoint keeps of a run, without pickle
`CheckpointingTrainer`                 its folder: whole or not at all; the newest good one is found
`LoggingTrainer`                       the log of the steps, also over a resume
`StepTrainer`                          an optimizer step
`RetryingTrainer`                      a step for which memory runs out is done again in smaller micro-batches
`GuardedTrainer`                       a step that is not finite is refused
`InterruptibleTrainer`                 signals: saving and stopping at step boundaries
`EvaluatingTrainer`                    exact sums over the rows of a set
`MovingTrainer`, `RememberingTrainer`  a reference that follows the policy; one that remembers
`LoadingTrainer`, `PreparingTrainer`   rows to batches; the model before the first step
`SearchingTrainer`                     hyperparameter search
`RecordingTrainer`                     ``train()`` as users call it: under signals, and with a record
`ShowingTrainer`                       what it does on the terminal, and what its numbers say in the log
====================================== ==========================================================================

The hooks that they override:

====================================== ==========================================================================
hook                                   why
====================================== ==========================================================================
``get_*_dataloader``                   an item is a whole optimizer step, planned alike on every rank
``_run_epoch`` and two more            the loop must not accumulate: the step already has its micro-batches
``training_step``                      micro-batches, gradient sync on the last, denominators of the whole step
``_get_grad_norm``, ``_clip_..``       the one host sync of a step: stop before a NaN reaches the weights
``_prepare_for_training``              checkpointing decided by memory, layers compiled, before the model is wrapped
``_build_accelerator_args``            accelerate leaves the compiling to that
``evaluation_loop``                    exact sums over rows instead of means of batch means
``train``, ``evaluate``, ``predict``   the model understands packed rows meanwhile; raw data sets are taken
``log``, ``_save/_load_optimizer_..``  the metric sums, also over a resume
``_maybe_log_save_..``, ``_evaluate``  a signal saves and stops; what was left of a step is taken up by the resumed run
``_save_checkpoint``, ``save_model``   whole or not at all; ``train`` goes on from the newest good one
``_finalize_training``                 the best checkpoint is looked at before it is loaded
``_determine_best_metric``             a NaN is never the best; a name that is no metric is a message
``_save``, ``create_model_card``       the user's arguments and a card with every checkpoint
``_load_from_checkpoint``, ``_best..`` safetensors alone; all adapters, whatever they are called; none is switched
``call_model_init``                    an adapter and a fresh reference for each trial
``hyperparameter_search``, its setup   what a trial suggests of the loss acts; one metric is the objective
====================================== ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback

from prefopt.reference import Precomputed, ReferencePolicy, make_reference
from prefopt.reference.policy import SeparateModel
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import innermost, install
from prefopt.trainer.adapters import (
    AllocateRanks,
    check_adapter,
    keep_differentiable,
    refuse_frozen,
    warn_of_acting,
    wrap_with_adapter,
)
from prefopt.trainer.arguments_given import check_given, use_one_device
from prefopt.trainer.best_metric import check_best_metric
from prefopt.trainer.callbacks import updates_reference
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.kernels import apply_layer_kernels, check_kernels, settle_layer_kernels
from prefopt.trainer.loading import EvalSets
from prefopt.trainer.model_card import write_model_card
from prefopt.trainer.moving import has_reference_logps
from prefopt.trainer.offloading import offloaded, stream_copies
from prefopt.trainer.progress.showing import ShowingTrainer
from prefopt.trainer.remembering import KeepReference
from prefopt.trainer.rows import custom_collator, prepare_options
from prefopt.trainer.sampling import add_sampling
from prefopt.trainer.setup import (
    aux_weight,
    check_kind,
    check_output_dir,
    disable_dropout,
    load_config,
    load_model,
    load_processing_class,
    model_name,
)
from prefopt.trainer.trackers import check_trackers, without_telemetry
from prefopt.trainer.unsloth import tags_of, unsloth_run

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(ShowingTrainer):
    """Trains a model on preference data; a subclass names its method and config, and may order the arguments.

    Args:
        model: path or hub id, ``PreTrainedModel``, or ``PeftModel``.
        ref_model: the reference; None takes what the policy starts from.
        args: the config; None makes one that writes to ``<model>-<METHOD>``.
        data_collator: makes padded batches of prepared rows; None builds batches in the model's layout.
        train_dataset: ``datasets.Dataset`` or ``IterableDataset``, in any format of docs/data.md.
        eval_dataset: the same, or a dict of several.
        processing_class: tokenizer or processor; None loads the model's.
        compute_metrics: gets `PairPredictions` and `PairLengths`.
        callbacks, optimizers, preprocess_logits_for_metrics: as in ``transformers.Trainer``.
        quantization_config: for a model given by name.
        peft_config: trains a new adapter of this kind.
        model_init: makes the model, anew for each trial; then ``model`` is None.
        tokenizer: older name of ``processing_class``.

    Raises:
        ValueError, TypeError: with what to change, before anything is trained.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[PreferenceConfig]]

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: EvalSets = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        model_init: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        args = args or self.config_class(f"{Path(model_name(model)).name or 'model'}-{self.method.upper()}")
        check_given(model, model_init, train_dataset, processing_class or tokenizer)
        check_output_dir(str(args.output_dir))
        check_trackers(args.report_to or ())
        without_telemetry(args.report_to or ())
        check_kernels(model, args)
        settle_layer_kernels(args)
        use_one_device(args)
        self.preference, self.preference_options = args.objective(), deepcopy(args._objective_options())
        self.given_reference, self.given_optimizers, self.peft_config = ref_model, optimizers, peft_config
        self.reference_updates = updates_reference(args, callbacks)
        processing_class = load_processing_class(processing_class or tokenizer, model, args)
        config = load_config(model, args)
        limit = getattr(model, "max_seq_length", None)
        self.prepare_options = prepare_options(args, self.preference.branches, config, limit)
        self.args, self.processing_class = args, processing_class  # needed before the parent's constructor sets them
        self.train_dataset = train_dataset = self.prepared(train_dataset, "train")
        eval_dataset = self.prepared_sets(eval_dataset)
        if model is not None:
            model = self.ready_model(load_model(model, args, quantization_config))
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.collate_given = data_collator = custom_collator(data_collator, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.default_collator(tokenizer.pad_token_id, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.start_window()
        self.add_own_callbacks()
        check_best_metric(args, eval_dataset)
        self.layout = self.chosen_layout()

    def add_own_callbacks(self) -> None:
        """What model, adapter and options ask for at the points of the loop."""
        self.add_callback(KeepReference(self.keep_reference))
        if self.unsloth_mode is not None:
            self.add_callback(self.unsloth_mode)
        self.sampling = add_sampling(self) if self.args.generate_during_eval else None
        if AllocateRanks.is_needed(self.model):
            self.add_callback(AllocateRanks())

    # -- model and reference -------------------------------------------------------------------------------------

    def ready_model(self, model: Any) -> Any:
        """The model with its adapter, without dropout, able to score; its reference is taken here."""
        args = self.args
        self.check_kind(model, "policy")
        self.unsloth_mode = unsloth_run(model, args)
        self.came_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if self.peft_config is not None:
            model = wrap_with_adapter(model, self.peft_config, args)
            warn_of_acting(model, self.peft_config)
        check_adapter(model, args)
        keep_differentiable(model)
        if args.disable_dropout:
            disable_dropout(model)
        apply_layer_kernels(model, args)
        install(model)
        innermost(model).add_model_tags(tags_of(innermost(model), self.method))
        self.aux_weight = aux_weight(innermost(model), args)
        self.reference, self.placed_reference = self.made_reference(model), None
        self.unchecked_identity = args.disable_dropout
        return model

    def check_kind(self, model: Any, role: str) -> None:
        """See `prefopt.trainer.setup.check_kind`."""
        check_kind(model, role, encoder_decoder=self.prepare_options.max_completion_length is not None)

    def made_reference(self, model: Any) -> ReferencePolicy | None:
        """What the policy is compared with, as it is now; None for an objective that needs none."""
        if not self.preference.needs_reference:
            return None
        args: Any = self.args
        given = self.given_reference
        if isinstance(given, str):
            given = load_model(given, args)
        if given is not None:
            self.check_kind(given, "reference model")
            apply_layer_kernels(given, args)
        if given is not None and args.disable_dropout:
            disable_dropout(given)
        return make_reference(
            model,
            given,
            precomputed=args.precompute_ref_log_probs or has_reference_logps(self.train_dataset),
            updates=self.reference_updates,
            remember=not self.reference_updates,
            ld_alpha=args.ld_alpha,
            model_adapter_name=args.model_adapter_name,
            ref_adapter_name=args.ref_adapter_name,
            force_use_ref_model=args.force_use_ref_model,
        )

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the mixture-of-experts load-balancing loss is part of the loss."""
        return bool(self.aux_weight)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model; None where it is the policy without adapter, precomputed, or not needed."""
        reference = None if isinstance(self.reference, Precomputed) else self.model_reference
        return reference.model if isinstance(reference, SeparateModel) else None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self.ready_model(super().call_model_init(trial))

    # -- running -------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        refuse_frozen(self.model)
        copies = stream_copies(self.args.device) if self.args.activation_offloading else None
        with segment_attention(*self.models()), offloaded(self.model, copies):
            return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with segment_attention(*self.models()):
            return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self, eval_dataset: EvalSets = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation set, or of ``eval_dataset`` in any format; of each by name, for a dict."""
        sets = self.prepared_sets(eval_dataset)
        metrics = super().evaluate(sets, ignore_keys, metric_key_prefix)
        if self.sampling is not None:
            self.leave_if_asked()
            self.sampling.sample_evaluated(sets, metric_key_prefix)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def create_model_card(self, model_name: str | None = None, **given: Any) -> None:
        """Write ``README.md`` to the run's folder; the arguments are those of `write_model_card`."""
        if self.is_world_process_zero():
            write_model_card(self, str(self.args.output_dir), model_name=model_name, **given)
