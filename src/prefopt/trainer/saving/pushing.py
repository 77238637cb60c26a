"""A checkpoint to the hub while training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import PushInProgress
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from prefopt import files

__all__ = ["push_checkpoint", "push_run", "withheld"]

MODEL_FILES = ("*.safetensors.index.json", CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME)
TEXT_OF_DATA = ("*.html", "pairs*.jsonl", "samples*.jsonl", "run.json")
"""Reports, pairs and samples; in ``run.json`` it may be in the message of an error, beside paths of this machine."""
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")


def push_checkpoint(trainer: Any, folder: str | Path) -> None:
    """Upload the model of a checkpoint, and the checkpoint where ``hub_strategy`` says so; returns at once.

    The model is copied to the output folder and sent from there: the checkpoint may be deleted before it has gone.

    Args:
        trainer: whose ``push_in_progress`` says whether an earlier upload still runs; this one is left out then, unless
            ``hub_always_push``.
        folder: the checkpoint, whole.
    """
    args, running = trainer.args, trainer.push_in_progress
    busy = running is not None and not running.is_done() and not args.hub_always_push
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END or busy:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    for path in model_files(Path(folder)):
        beside = Path(args.output_dir, f".{path.name}.copy")
        files.announce("write", beside)
        shutil.copyfile(path, beside)
        files.rename(beside, Path(args.output_dir, path.name))
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(args.output_dir)
    message = f"Step {trainer.state.global_step}"
    own = {"folder_path": args.output_dir, "ignore_patterns": withheld(args)}
    jobs: Any = [upload(trainer, commit_message=message, **own)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(folder).name
        jobs.append(
            upload(trainer, commit_message=f"{message}, checkpoint", folder_path=str(folder), path_in_repo=place)
        )
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        running.jobs.extend(jobs)


def push_run(
    trainer: Any,
    commit_message: str,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    card: Mapping[str, Any],
) -> Any:
    """Upload model, tokenizer and card of a run that has ended, and what its folder has beside `withheld`.

    Args:
        trainer: whose model it is.
        commit_message, blocking, token, revision, private: as in ``transformers.Trainer.push_to_hub``.
        card: keyword arguments of ``create_model_card``.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token or args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, **({} if private is None else {"private": private}))
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**card)
    trainer._finish_current_push()
    where: Any = {"repo_id": trainer.hub_model_id, "token": token, "revision": revision or args.hub_revision}
    what: Any = {"folder_path": args.output_dir, "ignore_patterns": withheld(args)}
    return HfApi().upload_folder(commit_message=commit_message, run_as_future=not blocking, **where, **what)


def withheld(args: Any) -> list[str]:
    """Patterns of the files of an output folder that stay on this machine: checkpoints, and what shows text of data.

    They hold in folders within it too, as those of the trials of a search. Trackers write samples into their files
    where samples are taken.
    """
    samples = ["*tfevents*"] if args.generate_during_eval else []
    patterns = ["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", *TEXT_OF_DATA, *samples]
    return [pattern for one in patterns for pattern in (one, f"*/{one}")]


def model_files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that are its model, weights first, and the options of the run."""
    for pattern in (*WEIGHTS, *MODEL_FILES, "training_args.json", "README.md"):
        yield from sorted(folder.glob(pattern))


def upload(trainer: Any, **options: Any) -> Any:
    """A job that sends a folder to the run's repository."""
    args = trainer.args
    return HfApi().upload_folder(
        repo_id=trainer.hub_model_id, token=args.hub_token, revision=args.hub_revision, run_as_future=True, **options
    )
