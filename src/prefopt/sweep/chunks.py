"""A trial's turn: its run goes on from where it was, for some steps, on a base model that all trials share.

A chunk is an ordinary run that goes on from its newest checkpoint and is paused (``trainer.pauses``): what comes out of
all chunks is, bit for bit, what one run gives (docs/design/sweep.md). Between two chunks nothing of a trial is in
memory. What trials have in common stays: models, tokenizers and prepared rows, each of them loaded once.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback

from prefopt.reference.adapters import is_peft
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.ending.signals import PausedRun
from prefopt.trainer.sampling import SampleCallback
from prefopt.trainer.setup import load_model, load_processing_class
from prefopt.trainer.versions import end_run

__all__ = ["AtStep", "Chunk", "Run", "Shared", "free", "load_shared", "train_chunk", "view"]

AtStep = Callable[[int, int, list[dict[str, Any]]], bool]
"""Of a step that is done, of all steps, and the rows logged so far: whether the chunk ends here."""
OF_ROWS = (
    "max_length",
    "max_completion_length",
    "truncation_mode",
    "on_bad_row",
    "pad_token",
    "image_roots",
    "is_encoder_decoder",
    "dataset_num_proc",
    "trust_remote_code",
)
"""Options that decide how rows are prepared."""


@dataclass(frozen=True)
class Run:
    """A trial as plain objects, made anew for each of its chunks.

    Args:
        trainer: the class of the method's trainer.
        args: its config.
        model: path or Hub name; its options are in ``args.model_init_kwargs``.
        quantization: settings of bitsandbytes, or None.
        peft: settings of the adapter, or None.
        data: names the data sets: runs of one name have the same.
        load_data: loads training and evaluation set.
    """

    trainer: Any
    args: PreferenceConfig
    model: str
    quantization: Any
    peft: Any
    data: str
    load_data: Callable[[], tuple[Any, Any]]


@dataclass
class Shared:
    """What trials have in common, by what decides it."""

    models: dict[str, Any] = field(default_factory=dict)
    processors: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    prepared: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """How a chunk ended."""

    steps: int
    max_steps: int
    is_over: bool
    """Whether the run is."""
    extra_checkpoint: int | None = None
    """The step of a checkpoint that is there for the pause alone."""


def train_chunk(run: Run, shared: Shared, at_step: AtStep, *, resume: bool) -> Chunk:
    """Train a trial until ``at_step`` says so, or to its end, where its model is saved as a run's is.

    Args:
        run: the trial.
        shared: what has been loaded so far; what is missing is added.
        at_step: asked after each step.
        resume: go on from the newest checkpoint; else begin.

    Raises:
        InterruptedRun, TerminatedRun: a signal was received, and there is a checkpoint.
    """
    trainer = made_trainer(run, shared)
    trainer.pauses = lambda step: at_step(step, trainer.state.max_steps, trainer.state.log_history)
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(run.args.output_dir))
        done = Chunk(trainer.state.global_step, trainer.state.max_steps, is_over=True)
    except PausedRun as pause:
        done = Chunk(pause.step, trainer.state.max_steps, False, pause.step if pause.is_extra else None)
    finally:
        end_run(trainer)
    return done


def free() -> None:
    """Give the memory of a chunk back: a trainer and its parts hold each other, so that no count of references does."""
    gc.collect()
    gc.freeze()  # what is left stays for the whole sweep; no later collection need look at it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_shared(run: Run, shared: Shared) -> tuple[Any, Any, tuple[Any, Any]]:
    """The model, the processing class and the raw data sets of a run, loaded unless they are there.

    Raises:
        ValueError, OSError, TypeError: one of them is not there, or is none.
    """
    args, of_model = run.args, model_key(run)
    if of_model not in shared.models:
        shared.models[of_model] = load_model(run.model, args, run.quantization)
    if (of_tokens := tokens_key(run)) not in shared.processors:
        shared.processors[of_tokens] = load_processing_class(None, run.model, args)
    if run.data not in shared.raw:
        shared.raw[run.data] = run.load_data()
    return shared.models[of_model], shared.processors[of_tokens], shared.raw[run.data]


def made_trainer(run: Run, shared: Shared) -> Any:
    """The trial's trainer on the shared model, with rows that may have been prepared for another."""
    args = run.args
    model, processing, raw = load_shared(run, shared)
    options = [getattr(args, name, None) for name in OF_ROWS]
    rows = repr((run.data, tokens_key(run), args.objective().branches, options))
    args.model_init_kwargs = None  # used up: the trainer is given a model
    train, evaluation = shared.prepared.get(rows, raw)
    trainer = run.trainer(
        view(model, shares_weights=run.peft is not None),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processing,
        peft_config=run.peft,
    )
    shared.prepared[rows] = trainer.train_dataset, trainer.eval_dataset
    trainer.remove_callback(PrinterCallback)  # rows and samples are in the files of the trial
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SampleCallback):
            callback.is_shown = False
    return trainer


def tokens_key(run: Run) -> str:
    args: Any = run.args
    return repr((run.model, args.model_init_kwargs, args.pad_token, args.trust_remote_code))


def model_key(run: Run) -> str:
    quantization = None if run.quantization is None else run.quantization.to_dict()
    return repr((run.model, run.args.model_init_kwargs, run.args.trust_remote_code, quantization))


def view(model: Any, *, shares_weights: bool) -> Any:
    """A model of its own, with modules, config and hooks of its own, so that nothing which a trial does to it is left
    to the next; its weights may be the very ones of ``model``.

    Args:
        model: loaded, and used by nobody else.
        shares_weights: for an adapter, which trains none of them; else they are copied.
    """
    if not shares_weights or is_peft(model):
        return copy.deepcopy(model)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        plain = type(weight) is nn.Parameter  # quantised ones carry what their numbers mean
        memo[id(weight)] = nn.Parameter(weight.detach(), weight.requires_grad) if plain else weight
    return copy.deepcopy(model, memo)
