"""When samples are taken: before training, at every evaluation and after training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from prefopt.data import tokenized_example
from prefopt.reference import ModelReference
from prefopt.reference.precompute import row_keys
from prefopt.trainer.generation import generated
from prefopt.trainer.samples import Sample, SampleTable, append_to_file, drop_later_than, send, summary
from prefopt.types import PAIR, TokenizedExample

__all__ = ["SampleCallback", "add_sampling"]

logger = logging.getLogger(__name__)

NEW_TOKENS = 128
"""Longest completion where no option says."""


def add_sampling(trainer: Any) -> SampleCallback:
    """Let ``trainer`` take samples; in front of the trackers' callbacks, which close their runs when training ends."""
    if trainer.eval_dataset is None:
        logger.warning(
            "generate_during_eval=True: there is no `eval_dataset`, so that there are samples only of the sets that "
            "`evaluate` is given."
        )
    callback = SampleCallback(trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class SampleCallback(TrainerCallback):
    """Lets policy and reference complete the first few prompts of each evaluation set.

    Args:
        trainer: a `PreferenceTrainer`; its ``evaluate`` calls `sample`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.is_shown = True
        """Whether samples go to the terminal, beside their file and the trackers."""
        self.sampled: dict[str, int] = {}
        """Evaluation set -> the step at which it was last sampled in this training."""
        self.remembered: dict[bytes, str] = {}
        """Content of a row -> the reference's completion, for a reference that does not move."""
        self.remembered_of: ModelReference | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampled.clear()
        if state.is_world_process_zero:
            drop_later_than(state.global_step, self.folder, again=self.trainer.evaluates_again)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # by now the trackers have begun
            self.sample_all()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end:  # other weights than the last step's
            self.sampled.clear()
        self.sample_all()

    def sample_all(self) -> None:
        """Samples of every evaluation set that the trainer has."""
        sets = self.trainer.eval_dataset
        if isinstance(sets, dict):
            for name, rows in sets.items():
                self.sample(rows, f"eval_{name}")
        elif sets is not None:
            self.sample(sets, "eval")

    def sample_evaluated(self, rows: Any, name: str) -> None:
        """Samples of the set that was just evaluated: the trainer's (None, or its name), or another; not of a dict."""
        own = self.trainer.eval_dataset
        rows = own if rows is None else own[rows] if isinstance(rows, str) else rows
        if not isinstance(rows, dict):  # of a dict every set is evaluated by itself
            self.sample(rows, name)

    def sample(self, rows: Any, name: str) -> None:
        """Complete the first prompts of a prepared set and show them; at most once for each step of a training.

        All ranks must call this, with the same set.
        """
        trainer, args = self.trainer, self.trainer.args
        step = trainer.state.global_step
        if trainer.is_in_train and self.sampled.get(name) == step:
            return
        self.sampled[name] = step
        first = list(islice(iter(rows), args.num_eval_samples))
        examples = [tokenized_example(row, PAIR) for row in first]
        policy = self.completions(trainer.model, examples)
        reference = self.reference_completions(first, examples)
        if examples and trainer.is_world_process_zero():
            samples = [self.as_text(*columns) for columns in zip(examples, policy, reference, strict=True)]
            table = SampleTable(name, step, samples)
            append_to_file(table, self.folder)
            if self.is_shown:
                tqdm.write(summary(table))
            send(table, trainer.callback_handler.callbacks)

    @property
    def folder(self) -> str:
        """Where the run writes; a trial of a search has a folder of its own."""
        return self.trainer._get_output_dir(getattr(self.trainer, "_trial", None))

    def as_text(self, example: TokenizedExample, policy: str, reference: str | None) -> Sample:
        chosen, rejected = (self.decoded(example.completion_ids[branch]) for branch in PAIR)
        return Sample(self.decoded(example.prompt_ids), chosen, rejected, policy, reference)

    @property
    def tokenizer(self) -> Any:
        processing_class = self.trainer.processing_class
        return getattr(processing_class, "tokenizer", processing_class)

    def decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def completions(self, model: nn.Module, examples: Sequence[TokenizedExample]) -> list[str]:
        """What ``model`` says to each prompt, on every rank.

        Each rank generates a share of them, but of a model that is divided among the ranks all of them, together.
        """
        trainer, args = self.trainer, self.trainer.args
        divided = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        world, rank = (1, 0) if divided else (args.world_size, args.process_index)
        limit = args.eval_sample_tokens or getattr(args, "max_completion_length", None) or NEW_TOKENS
        own, size, texts = examples[rank::world], args.eval_batch_size, []
        with trainer.part("samples", len(own), "prompts") as part:
            for start in range(0, len(own), size):
                with trainer.compute_loss_context_manager():
                    ids = generated(model, own[start : start + size], self.tokenizer, limit, trainer.vision)
                texts += [self.decoded(completion) for completion in ids]
                part.advance(len(ids))
        shares = [texts] if world == 1 else gather_object([texts])
        return [shares[place % world][place // world] for place in range(len(examples))]

    def reference_completions(self, rows: Sequence[Any], examples: Sequence[TokenizedExample]) -> list[str | None]:
        """The same for the reference; it is asked once for each prompt unless it moves."""
        trainer = self.trainer
        reference = trainer.model_reference
        if reference is None:
            return [None] * len(examples)
        if reference is not self.remembered_of or trainer.reference_updates:
            self.remembered, self.remembered_of = {}, reference
        keys = row_keys(rows)
        if not all(key in self.remembered for key in keys):
            with self.at_hand(reference), reference.active() as model:
                self.remembered |= dict(zip(keys, self.completions(model, examples), strict=True))
        return [self.remembered[key] for key in keys]

    @contextmanager
    def at_hand(self, reference: ModelReference) -> Iterator[None]:
        """The reference on the run's device, and afterwards where it was."""
        home = next(reference.model.parameters()).device
        self.trainer.place_reference()
        try:
            yield
        finally:
            reference.to(home)
