"""The same training run in two libraries: TRL 1.16 and prefopt, and the comparison of what they log."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from datasets import Dataset
from tiny_models import standard_rows, tiny_model, word_tokenizer
from transformers import PreTrainedTokenizerFast

Library = Literal["trl", "prefopt"]
Row = dict[str, float]
Columns = Mapping[str, list[Any]]

RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""Both libraries compute in float32 but sum in other orders and layouts. Three steps of a tiny model agree to about
1e-5; a wrong factor, sign, mask or denominator shows as 1e-2 or more. ABSOLUTE is for metrics near zero (a margin)."""

POLICY: dict[str, Any] = {"seed": 0, "tie_word_embeddings": True}
REFERENCE: dict[str, Any] = {"seed": 1, "tie_word_embeddings": True}

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 0.3,
    "optim": "sgd",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 7,
}
"""SGD with a clipped norm: a step moves the loss along the gradient, and the norm before clipping is logged. A wrong
gradient shows in ``grad_norm`` of step 1 and in all of steps 2 and 3. Adam would hide a factor."""

HOME_IN_TRL = {"dpo": "trl", "cpo": "trl.experimental.cpo", "tpo": "trl.experimental.tpo"}
OUTPUTS = tempfile.TemporaryDirectory(prefix="parity-")
"""Output folders of all runs; removed when the interpreter ends."""
BOOKKEEPING = {"epoch", "step", "total_flos"}


def classes(library: Library, method: str) -> tuple[type, type]:
    """Config and trainer class of a method in a library."""
    pytest.importorskip("trl")
    home = importlib.import_module(HOME_IN_TRL[method] if library == "trl" else "prefopt")
    return getattr(home, f"{method.upper()}Config"), getattr(home, f"{method.upper()}Trainer")


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """With a pad token: TRL's CPO cannot do without."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build(library: Library, method: str, config: Mapping[str, Any], **arguments: Any) -> Any:
    """A trainer with the settings of ``COMMON``, ``config`` on top, and a tiny model unless ``model`` is given.

    ``trainer_class`` takes the place of the library's own.
    """
    make_config, make_trainer = classes(library, method)
    make_trainer = arguments.pop("trainer_class", make_trainer)
    given = {"model": tiny_model(**POLICY), "processing_class": padding_tokenizer()} | arguments
    given.setdefault("train_dataset", Dataset.from_dict(standard_rows(gold=method == "tpo")))
    output = tempfile.mkdtemp(dir=OUTPUTS.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_trainer(args=make_config(output_dir=output, **{**COMMON, **config}), **given)


def run(library: Library, method: str, config: Mapping[str, Any], **arguments: Any) -> list[Row]:
    """Train three steps; one row of the log per step."""
    trainer = build(library, method, config, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def evaluate(library: Library, method: str, config: Mapping[str, Any], rows: Columns, **arguments: Any) -> Row:
    """Metrics of the untrained model on ``rows``, without the timings."""
    trainer = build(library, method, config, eval_dataset=Dataset.from_dict(dict(rows)), **arguments)
    timings = ("_runtime", "_per_second", "_preparation_time")
    return {key: value for key, value in trainer.evaluate().items() if not key.endswith(timings)}


def assert_same_row(ours: Row, theirs: Row, *, without: Sequence[str] = (), where: str = "") -> None:
    """Every key that TRL logs is in our row with the same value; prefopt may log more."""
    compared = sorted(set(theirs) - set(without) - BOOKKEEPING)
    missing = [key for key in compared if key not in ours]
    assert not missing, f"{where}: TRL logs {missing}, prefopt does not"
    wrong = {
        key: (ours[key], theirs[key])
        for key in compared
        if ours[key] != pytest.approx(theirs[key], rel=RELATIVE, abs=ABSOLUTE)
    }
    assert not wrong, f"{where} (prefopt, TRL): {wrong}"


def assert_same_run(ours: list[Row], theirs: list[Row], *, without: Sequence[str] = ()) -> None:
    assert len(ours) == len(theirs) == COMMON["max_steps"]
    for step, (our_row, their_row) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert_same_row(our_row, their_row, without=without, where=f"step {step}")


def compare(
    method: str, config: Mapping[str, Any], *, without: Sequence[str] = (), arguments: Any = dict
) -> tuple[list[Row], list[Row]]:
    """Run both libraries and hold their logs together; ``arguments()`` makes fresh trainer arguments for each."""
    theirs = run("trl", method, config, **arguments())
    ours = run("prefopt", method, config, **arguments())
    assert_same_run(ours, theirs, without=without)
    return ours, theirs
