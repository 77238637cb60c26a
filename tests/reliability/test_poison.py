"""A weight, a row, a gradient or the reference is poisoned at some step: the run stops, names it, harms nothing."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from scale import LONG
from short_runs import log_rows, trainer, weights
from transformers import TrainerCallback

from prefopt.trainer.guards.nonfinite import NonFiniteStepError

STEPS = 4
NAN, INF = float("nan"), float("inf")
TOKEN = 16
"""Of a word that some rows of each step have and others have not."""


class Poison(TrainerCallback):
    """Poisons before the given steps (from 1), and keeps what the run had just before them."""

    def __init__(self, steps: set[int], act: Callable[[Any], None]) -> None:
        self.steps, self.act = steps, act
        self.run: Any = None
        self.undo: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            self.undo = self.act(self.run)
            self.weights = weights(self.run.model).view(torch.int32)
            self.optimizer = moments(self.run)
            self.files = digests(Path(args.output_dir))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.undo is not None:
            self.undo.remove()
            self.undo = None


def moments(run: Any) -> list[torch.Tensor]:
    state = run.optimizer.state_dict()["state"]
    return [value.clone() for of_weight in state.values() for value in of_weight.values() if torch.is_tensor(value)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a checkpoint."""
    files = sorted(path for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    return {str(path): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def a_weight(value: float) -> Callable[[Any], None]:
    def act(run: Any) -> None:
        with torch.no_grad():
            matrices = [p for n, p in run.model.named_parameters() if p.requires_grad and "proj" in n]
            matrices[0].view(-1)[5] = value

    return act


def a_row(run: Any) -> None:
    with torch.no_grad():
        run.model.get_input_embeddings().weight[TOKEN] = NAN


def a_gradient(run: Any) -> Any:
    parameter = [p for p in run.model.parameters() if p.requires_grad][-1]
    return parameter.register_hook(lambda gradient: gradient * NAN)


def a_rows_gradient(run: Any) -> Any:
    """Rows with `TOKEN` have finite log-probs, and a gradient that is not."""

    def spoil(module: Any, args: Any, output: torch.Tensor) -> None:
        found = (args[0] == TOKEN).unsqueeze(-1)
        output.register_hook(lambda gradient: torch.where(found, gradient * NAN, gradient))

    return run.model.get_input_embeddings().register_forward_hook(spoil)


def the_reference(run: Any) -> None:
    with torch.no_grad():
        run.model_reference.model.lm_head.weight[7] = NAN


POISONS = {
    "a NaN weight": (a_weight(NAN), "loss is not finite.*weights are not finite before it"),
    "an infinite weight": (a_weight(INF), "weights are not finite before it"),
    "a row": (a_row, "loss is not finite"),
    "a gradient": (a_gradient, "gradient norm is nan, the loss is finite"),
    "the gradient of rows": (a_rows_gradient, "gradient norm is nan, the loss is finite"),
    "the reference": (the_reference, "reference's log-probs are not finite"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as always": {},
    "accumulating": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "an adapter": {"lora": True},
    "bf16": {"bf16": True},
    "not clipped": {"max_grad_norm": 0.0},
    "rarely logged": {"logging_steps": 3, "logging_nan_inf_filter": True},
}
EVERY = [(poison, setting, step) for poison in POISONS for setting in SETTINGS for step in range(1, STEPS + 1)]
IN_SHORT = [(poison, "as always", step) for poison, step in zip(POISONS, (1, 4, 1, 4, 2, 1), strict=True)]
IN_SHORT += [(("a row", "a gradient")[place % 2], setting, 3) for place, setting in enumerate(list(SETTINGS)[1:])]
NONE = {("the reference", "an adapter"), ("the gradient of rows", "an adapter")}
"""An adapter's reference is the model without it, and the embeddings under it have no gradient."""
CASES = [case for case in (EVERY if LONG else IN_SHORT) if case[:2] not in NONE]


def made(folder: Path, poison: Poison, *, lora: bool = False, **options: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]) if lora else None
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **options}
    run = trainer(folder, callbacks=[poison], peft_config=config, use_cpu=True, **options)
    poison.run = run
    return run


def holds_token(row: dict[str, Any]) -> bool:
    return any(TOKEN in row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


@pytest.mark.parametrize(("kind", "setting", "step"), CASES, ids=str)
def test_poison_stops_the_step_before_the_update(kind: str, setting: str, step: int, tmp_path: Path) -> None:
    act, message = POISONS[kind]
    poison = Poison({step}, act)
    run = made(tmp_path, poison, **SETTINGS[setting])
    with pytest.raises(NonFiniteStepError, match=rf"(?s)^Step {step}: .*{message}") as caught:
        run.train()
    error = caught.value
    assert error.step == step
    assert run.state.global_step == step - 1
    assert torch.equal(weights(run.model).view(torch.int32), poison.weights)
    assert same(moments(run), poison.optimizer)
    assert bool(poison.optimizer) == (step > 1), "the test is vacuous"
    assert digests(tmp_path) == poison.files
    assert len(list(tmp_path.glob("checkpoint-*"))) == step - 1
    assert all(math.isfinite(value) for row in log_rows(run) for value in row.values())
    check_dump(run, error, kind)


def check_dump(run: Any, error: NonFiniteStepError, kind: str) -> None:
    """The folder has the rows of the step, and names those that are guilty."""
    folder = Path(run.args.output_dir, f"_nonfinite-step-{error.step}")
    assert error.folder == folder
    assert str(folder) in str(error)
    found = json.loads((folder / "rank-0.json").read_text(), parse_constant=pytest.fail)
    tensors = load_file(folder / "rank-0.safetensors")
    rows = {row["row"]: row for row in run.train_dataset}
    in_step = [row for batch in run.last_step.micro_batches for row in batch.rows]
    assert [pair["row"] for pair in found["pairs"]] == in_step
    for place, pair in enumerate(found["pairs"]):
        row = rows[pair["row"]]
        assert tensors[f"{place}/chosen_ids"].tolist() == row["chosen_ids"]
        assert pair["text"]["prompt"] == run.processing_class.decode(row["prompt_ids"])
    guilty = [pair["row"] for pair in found["pairs"] if pair["guilty"]]
    if kind in ("a row", "the gradient of rows"):
        expected = [row for row in in_step if holds_token(rows[row])]
        assert 0 < len(expected) < len(in_step), "the test is vacuous"
        assert guilty == expected == list(error.rows)
    if kind == "a gradient":
        assert list(found["gradients_not_finite"]) == [
            [n for n, p in run.model.named_parameters() if p.requires_grad][-1]
        ]
        assert found["learning_rate"] > 0
        assert len(found["steps_before"]) == error.step - 1
    if "weight" in kind:
        assert len(found["weights_not_finite"]) == 1


def test_a_run_goes_on_from_the_checkpoint_before_the_poison(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", max_steps=STEPS, use_cpu=True)
    whole.train()
    with pytest.raises(NonFiniteStepError):
        made(tmp_path / "poisoned", Poison({3}, a_gradient)).train()
    again = made(tmp_path / "poisoned", Poison(set(), a_gradient))
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("options", [{}, {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1}], ids=str)
def test_a_step_that_is_left_out_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """Neither weights, momentum and weight decay, nor the means of the log, which say how many were left out."""
    kept: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    class Keep(Poison):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end()
            kept[state.global_step] = weights(self.run.model), moments(self.run)

    poison = Keep({2}, a_gradient)
    run = made(tmp_path, poison, on_nonfinite="skip", logging_steps=2, **options)
    run.train()
    assert torch.equal(kept[1][0], kept[2][0])
    assert kept[1][1], "the test is vacuous"
    assert same(kept[1][1], kept[2][1])
    assert not torch.equal(kept[2][0], kept[3][0])
    first, second, last = log_rows(run)
    assert (first["skipped_steps"], second["skipped_steps"], last["skipped_steps"]) == (1, 0, 1)
    alone = trainer(tmp_path / "alone", max_steps=STEPS, logging_steps=1, use_cpu=True, **options)
    alone.train()
    expected = log_rows(alone)[0]  # of the two steps of the first row only this one counts
    assert {name: first[name] for name in ("loss", "logps/chosen", "num_tokens")} == pytest.approx(
        {name: expected[name] for name in ("loss", "logps/chosen", "num_tokens")}
    )
    assert last["train_loss"] == pytest.approx((first["loss"] + 2 * second["loss"]) / 3)
    assert first["learning_rate"] == pytest.approx(log_rows(alone)[1]["learning_rate"])  # the schedule goes on


def test_the_error_comes_through_a_pickle() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteStepError("what", 3, [1, 2], Path("there"))))
    assert (str(error), error.step, error.rows, error.folder) == ("what", 3, (1, 2), Path("there"))


def test_a_failed_run_leaves_nothing_in_the_log_of_the_next(tmp_path: Path) -> None:
    poison = Poison({3}, a_gradient)
    run = made(tmp_path / "run", poison, logging_steps=STEPS, learning_rate=0.0)
    with pytest.raises(NonFiniteStepError):
        run.train()
    poison.undo.remove()
    run.remove_callback(poison)
    run.train()
    alone = made(tmp_path / "alone", Poison(set(), a_gradient), logging_steps=STEPS, learning_rate=0.0)
    alone.train()
    names = ("loss", "num_tokens", "logps/chosen", "rewards/margins")
    assert [log_rows(run)[0][name] for name in names] == [log_rows(alone)[0][name] for name in names]


def test_a_row_of_steps_that_were_all_left_out_has_no_loss(tmp_path: Path) -> None:
    """Transformers' filter, which would put the mean of other steps there, changes nothing."""
    run = made(tmp_path, Poison({2}, a_gradient), on_nonfinite="skip", max_steps=3, logging_nan_inf_filter=True)
    run.train()
    first, second, third, _ = log_rows(run)
    assert math.isnan(second["loss"])
    assert math.isnan(second["grad_norm"])
    assert "rewards/margins" not in second
    assert math.isfinite(first["loss"])
    assert math.isfinite(third["loss"])


def test_a_run_that_leaves_out_every_step_does_not_succeed(tmp_path: Path) -> None:
    run = made(tmp_path, Poison(set(range(2, 30)), a_gradient), on_nonfinite="skip", save_strategy="no", max_steps=30)
    with pytest.raises(NonFiniteStepError, match=r"^10 steps in a row were not finite"):
        run.train()
    assert run.state.global_step == 10
    assert len(list(tmp_path.glob("_nonfinite-step-*"))) == 10


@pytest.mark.parametrize("options", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "no"}], ids=str)
def test_weights_that_are_not_finite_are_not_saved_as_a_success(options: dict[str, Any], tmp_path: Path) -> None:
    """The last update leaves the numbers there are: no step comes after it that would notice."""

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == 2:
                a_weight(INF)(run)

    run = trainer(tmp_path, max_steps=2, callbacks=[Overflow()], use_cpu=True, **options)
    with pytest.raises(NonFiniteStepError, match=r"The weights are not finite after step 2.*first model.layers.0"):
        run.train()
    saved = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert saved == (["checkpoint-1"] if "save_steps" in options else [])


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_a_metric_that_is_not_finite_is_never_the_best(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = iter([1.0, value, 2.0])
    run = trainer(
        tmp_path,
        max_steps=3,
        eval_dataset=trainer(tmp_path / "rows", count=4).train_dataset,
        compute_metrics=lambda _: {"quality": next(values)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
        use_cpu=True,
    )
    run.train()
    assert run.state.best_metric == 2.0
    assert run.state.best_global_step == 3
    assert f"gives numbers that are not finite: quality {value}" in caplog.text
    logged = [row["eval_quality"] for row in run.state.log_history if "eval_quality" in row]
    assert str(logged[1]) == str(value)
