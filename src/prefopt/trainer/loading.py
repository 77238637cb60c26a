"""How data reaches the trainer: any format to token ids, token ids to batches in the model's layout, and loaders."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import datasets
from accelerate import PartialState

from prefopt.batching import (
    DataCollatorForPreference,
    DataCollatorForTriplePreference,
    TokenBudget,
    lengths_of_set,
)
from prefopt.batching.images import VisionInputs, vision_inputs
from prefopt.batching.lengths import image_counts
from prefopt.data import PrepareOptions, prepare_dataset, tokenized_example
from prefopt.data.images import has_images, image_tensors
from prefopt.reference.policy import SeparateModel
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.capability import LayoutChoice, choose_layout
from prefopt.scoring.encoder_decoder import is_encoder_decoder
from prefopt.scoring.forward import innermost
from prefopt.trainer.adapters import can_recompute
from prefopt.trainer.batches import collate_into, collate_with, epoch_order, loader_options, trial_row
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.geometry import Geometry
from prefopt.trainer.loader import Check, Collate, StepLoader, make_loader
from prefopt.trainer.precompute import with_precomputed_logps
from prefopt.trainer.remembering import RememberingTrainer
from prefopt.trainer.rows import check_pair_numbers, refuse_mixed, refuse_mixed_step
from prefopt.trainer.sharding import prepared_for_scoring, tried_while_whole
from prefopt.trainer.versions import chosen_checkpointing, recomputing

__all__ = ["PADDING_LAYOUTS", "EvalSets", "LoadingTrainer"]

logger = logging.getLogger(__name__)

PADDING_LAYOUTS = ("padded", "encoder_decoder")
EvalSets = Any
"""None, a data set, or a dict of data sets."""


class LoadingTrainer(RememberingTrainer):
    """Replaces transformers' data hooks: an item of a loader is a whole optimizer step, planned alike on every rank."""

    method: ClassVar[str]
    prepare_options: PrepareOptions
    layout: LayoutChoice
    placed_reference: SeparateModel | None
    part: Callable[..., AbstractContextManager[Any]]
    """Shows a part of the run."""

    def models(self) -> list[Any]:
        """The models that score: the policy, and the reference where it is a model of its own."""
        own = self.model_reference
        return [self.model, *([own.model] if isinstance(own, SeparateModel) else [])]

    def place_reference(self) -> None:
        """A reference model of its own goes to the device and under the run's precision; once."""
        reference = self.model_reference
        if isinstance(reference, SeparateModel) and reference is not self.placed_reference:
            reference.model = prepared_for_scoring(self.accelerator, reference.model)
            self.placed_reference = reference
        if isinstance(reference, SeparateModel):
            reference.to(self.args.device)

    @functools.cached_property
    def vision(self) -> VisionInputs | None:
        """How images reach the policy; None for a text model, or a processor that takes none."""
        if not has_images(self.processing_class):
            return None
        return vision_inputs(innermost(self.model), functools.partial(image_tensors, self.processing_class))

    def prepared(self, dataset: Any, name: str, counted: Callable[[int], None] | None = None) -> Any:
        """A data set as token ids; one that is prepared already as it is. One rank speaks of skipped rows.

        Args:
            dataset, name, counted: see `prepare_dataset`.
        """
        state = PartialState()
        if not state.is_main_process:
            logging.getLogger("prefopt.data").setLevel(logging.ERROR)
        with state.main_process_first():
            rows = prepare_dataset(dataset, self.processing_class, self.prepare_options, name=name, counted=counted)
        check_pair_numbers(rows, self.preference, name)
        return rows

    def prepared_sets(self, sets: EvalSets) -> EvalSets:
        """The same for None, a set, or a dict of several."""
        if sets is None or isinstance(sets, str):
            return sets
        if isinstance(sets, dict):
            return {name: self.prepared(dataset, name) for name, dataset in sets.items()}
        return self.prepared(sets, "eval")

    def default_collator(self, pad_token_id: int, args: PreferenceConfig) -> DataCollatorForPreference:
        """The collator that makes the padded batches of these rows, for users who look at ``data_collator``."""
        options: Any = {"pad_token_id": pad_token_id, "pad_to_multiple_of": args.pad_to_multiple_of}
        if self.method == "tpo":
            return DataCollatorForTriplePreference(include_reference="gold" in self.preference.branches, **options)
        return DataCollatorForPreference(**options)

    def chosen_layout(self) -> LayoutChoice:
        """The batch layout, tried on the first pair; said in one line."""
        wanted = "padded" if self.collate_given is not None else self.args.batch_layout
        if self.collate_given is not None and is_encoder_decoder(innermost(self.model).config):
            raise ValueError(
                "`data_collator` was given for an encoder-decoder model. Collators make rows of prompt and completion, "
                "which such a model does not have: its encoder reads the one, its decoder the other. Leave "
                "`data_collator` out."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            tried = functools.partial(self.tried_layout, wanted)
            choice = tried_while_whole(self.models(), self.args.device, tried)
        else:
            choice = self.tried_layout(wanted)
        logger.log(logging.WARNING if choice.reasons else logging.INFO, "%s", choice)
        multiple = self.args.pad_to_multiple_of
        if multiple is not None and choice.layout not in PADDING_LAYOUTS:
            logger.warning("pad_to_multiple_of=%s has no effect: layout %s does not pad.", multiple, choice.layout)
        return choice

    def tried_layout(self, wanted: str, on_a_pair: bool = True) -> LayoutChoice:
        """The first layout from ``wanted`` on that the policy, and a reference of another kind, compute rightly.

        Activations are recomputed in the trial wherever they may be in training.
        """
        row = trial_row(self.train_dataset) if on_a_pair else None
        branches = self.preference.branches
        example = tokenized_example(row, branches) if row else None
        if example is not None and example.images and self.vision is None:
            raise ValueError(
                f"The data has images (row {example.row}), and {type(innermost(self.model)).__name__} takes none. Use "
                "a vision-language model, or remove the column of images to train on the text alone."
            )
        own, inner = self.model_reference, innermost(self.model)
        others = [own.model] if isinstance(own, SeparateModel) and not own.derives_from_policy else []
        may_recompute = can_recompute(self.model) and chosen_checkpointing(self.args) is not False
        choice = LayoutChoice(wanted)
        with ExitStack() as stack:
            if may_recompute:
                stack.enter_context(recomputing(inner, self.args.gradient_checkpointing_kwargs))
            for model in (self.model, *others):
                found = choose_layout(model, choice.layout, example, branches, self.vision)
                choice = LayoutChoice(found.layout, tuple(dict.fromkeys(choice.reasons + found.reasons)))
        return choice

    def collate(self, *, padded: bool = False) -> Collate:
        """Rows of a micro-batch -> batch."""
        if self.collate_given is not None:
            return collate_with(self.collate_given, self.preference.branches)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        return collate_into(
            self.padded_layout if padded else self.layout.layout,
            self.preference.branches,
            self.vision,
            pad_token_id=tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,  # type: ignore[arg-type]
        )

    def new_collate(self, *, padded: bool = False) -> Collate:
        """`collate`, with the keys of rows where they are looked up."""
        return self.with_keys(self.collate(padded=padded))

    @property
    def padded_layout(self) -> str:
        """The layout whose logits have a row for each completion."""
        return self.layout.layout if self.layout.layout in PADDING_LAYOUTS else "padded"

    def geometry(self, per_device: int, accumulation: int = 1, *, padded: bool = False) -> Geometry:
        """How a step is divided; ``padded`` as `collate` is given it, since tokens are counted as batches are made."""
        args, budget = self.args, None
        if args.tokens_per_batch is not None:
            layout = self.padded_layout if padded else self.layout.layout
            multiple: Any = args.pad_to_multiple_of
            budget = TokenBudget(args.tokens_per_batch, layout, self.preference.branches, multiple)
        return Geometry(per_device, accumulation, args.world_size, args.process_index, budget)

    def get_train_dataloader(self) -> StepLoader:
        """Batches by optimizer step, in the order that transformers' trainer gives with the same seed."""
        args = self.args
        self.place_reference()
        self.begin_reference()
        check = self.check_images(self.train_dataset)
        rows = self.precomputed(self.train_dataset)
        geometry = self.geometry(self._train_batch_size, self.accumulation)
        order, drop_last = self.training_order(rows, geometry), args.dataloader_drop_last
        collate = self.new_collate()
        options = {"order": order, "drop_last": drop_last, "check": check, **loader_options(args)}
        return make_loader(rows, collate, geometry, **options)

    def training_order(self, rows: Any, geometry: Geometry) -> Callable[[int], Sequence[int]]:
        """Epoch -> the indices of prepared rows in the order of that epoch."""
        args = self.args
        return epoch_order(
            args.train_sampling_strategy,
            len(rows) if isinstance(rows, datasets.Dataset) else 0,
            seed=args.seed if args.data_seed is None else args.data_seed,
            batch_size=geometry.block_size,
            lengths=functools.cache(lambda: lengths_of_set(rows, self.preference.branches).totals.tolist()),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """Of each item one micro-batch per rank, or more within the budget of tokens; the items in the set's order."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`: give one to the trainer or to `evaluate`.")
        self.place_reference()
        if not self.is_in_train:
            self.begin_reference()
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index]
        check = self.check_images(rows)
        padded = self.wants_logits
        geometry = self.geometry(self.args.eval_batch_size, padded=padded)
        collate = self.new_collate(padded=padded)
        return make_loader(self.precomputed(rows), collate, geometry, check=check, **loader_options(self.args))

    def check_images(self, rows: Any) -> Check | None:
        """Refuses rows with and without images in one set, where weights are divided among ranks.

        Returns:
            For a stream, what refuses them in a step.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled) or self.args.world_size == 1:
            return None
        if not isinstance(rows, datasets.Dataset):
            return refuse_mixed_step
        refuse_mixed(image_counts(rows))
        return None

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        return self.get_eval_dataloader(self.prepared_sets(test_dataset))

    def precomputed(self, rows: Any) -> Any:
        """``rows`` with reference log-probs, where they are wanted and the set can be read in advance."""
        args: Any = self.args
        remembered = self.remembered
        self.take_given_logps(rows)
        if not getattr(args, "precompute_ref_log_probs", False) or remembered is None:
            return rows
        if not isinstance(rows, datasets.Dataset):
            if reason := self.why_not_looked_up():
                logger.warning("precompute_ref_log_probs=True: a stream is scored whenever a row comes (%s).", reason)
            return rows
        per_device = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        with segment_attention(*self.models()):
            rows = with_precomputed_logps(
                rows,
                remembered,
                self.collate(),
                self.geometry(per_device),
                self.accelerator,
                loader_options(args),
                self.is_left,
                self.in_fitting_batches,
                self.part,
            )
        if isinstance(remembered.source, SeparateModel):
            remembered.source.to("cpu")  # its work is done until a set comes that was not scored
        return rows
