"""Constructor and loop: combinations that fail in TRL 1.16 and train in prefopt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from parity_harness import COMMON, POLICY, REFERENCE, assert_same_run, build, classes, run
from tiny_models import standard_rows, tiny_model, word_tokenizer

pytestmark = pytest.mark.trl


def pairs(count: int = 12, seed: int = 0) -> Dataset:
    return Dataset.from_dict(standard_rows(count, seed=seed))


CPO_CASES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception]]] = {
    "no pad token": (lambda: {"processing_class": word_tokenizer()}, ValueError),
    "evaluation sets in a dict": (lambda: {"eval_dataset": {"held_out": pairs(4, seed=5)}}, AttributeError),
    "streaming": (lambda: {"train_dataset": pairs().to_iterable_dataset()}, TypeError),
    "model_init": (lambda: {"model": None, "model_init": lambda: tiny_model(**POLICY)}, (AttributeError, ValueError)),
}


@pytest.mark.parametrize("case", CPO_CASES)
def test_cpo_takes(case: str) -> None:
    arguments, error = CPO_CASES[case]
    with pytest.raises(error):
        run("trl", "cpo", {}, **arguments())
    log = run("prefopt", "cpo", {}, **arguments())
    assert log[0]["loss"] == pytest.approx(run("prefopt", "cpo", {})[0]["loss"], rel=1e-5)


def test_cpo_evaluates_raw_rows() -> None:
    with pytest.raises(KeyError):
        build("trl", "cpo", {}).evaluate(pairs(4))
    assert build("prefopt", "cpo", {}).evaluate(pairs(4))["eval_loss"] > 0


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_args_may_be_left_out(method: str, policy_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = Dataset.from_dict(standard_rows(4, gold=True))
    trainer = classes("prefopt", method)[1](policy_path, train_dataset=data)
    assert Path(trainer.args.output_dir).name == f"{Path(policy_path).name}-{method.upper()}"
    if method == "cpo":
        with pytest.raises(AttributeError):
            classes("trl", method)[1](policy_path, train_dataset=data)


def test_bf16_is_no_error_without_the_hardware(tmp_path: Path) -> None:
    """The default precision: fp32 on a CPU, said in one line. TRL's default asks for bf16 and transformers refuses."""
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    ours, theirs = (classes(library, "dpo")[0] for library in ("prefopt", "trl"))
    assert ours(str(tmp_path)).bf16 is False
    with pytest.raises(ValueError, match="bf16"):
        theirs(str(tmp_path))


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_batches_grouped_by_length(method: str) -> None:
    config = {"train_sampling_strategy": "group_by_length"}
    with pytest.raises(ValueError, match="infer lengths"):
        run("trl", method, config, **({"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}))
    assert len(run("prefopt", method, config)) == 3


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_micro_batches_by_a_budget_of_tokens(method: str) -> None:
    """A step of four pairs, in one micro-batch or cut by tokens, is the same step. TRL has no such option."""
    with pytest.raises(TypeError, match="tokens_per_batch"):
        build("trl", method, {"tokens_per_batch": 60})
    cut = build("prefopt", method, {"tokens_per_batch": 60})
    assert all(len(step.micro_batches) > 1 for step in cut.get_train_dataloader())
    assert_same_run(run("prefopt", method, {"tokens_per_batch": 60}), run("prefopt", method, {}))


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_activations_are_kept_where_there_is_room(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL recomputes them, whatever the memory, unless it is told not to; the numbers are the same."""
    monkeypatch.delitem(COMMON, "gradient_checkpointing")
    ours, theirs = (build(library, method, {}) for library in ("prefopt", "trl"))
    for trainer, recomputes in ((ours, False), (theirs, True)):
        trainer.train()
        layers = [module for module in trainer.model.modules() if getattr(module, "gradient_checkpointing", False)]
        assert bool(layers) is recomputes
    for our_row, their_row in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "rewards/margins"} & set(their_row):
            assert our_row[name] == pytest.approx(their_row[name], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_experts_are_balanced_by_every_method(method: str) -> None:
    """The auxiliary loss is on for a model that has one, and logged; in TRL by DPO alone."""
    family = {"family": "qwen3_moe", "router_aux_loss_coef": 0.5}
    on, off = (
        run("prefopt", method, config, model=tiny_model(**family))[0] for config in ({}, {"router_aux_loss_coef": 0.0})
    )
    assert on["loss"] == pytest.approx(off["loss"] + 0.5 * on["aux_loss"], rel=1e-4)
    assert "aux_loss" not in run("trl", method, {}, model=tiny_model(**family))[0]


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_prompt_tuning(method: str, policy_path: str) -> None:
    """Virtual tokens in front of every sequence: shapes that do not fit in TRL's CPO and TPO."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    log = run("prefopt", method, {}, model=policy_path, peft_config=config)
    assert log[2]["loss"] != log[0]["loss"]
    if method != "dpo":
        with pytest.raises((ValueError, RuntimeError)):
            run("trl", method, {}, model=policy_path, peft_config=config)


def test_keep_end_is_no_deprecated_mode(tmp_path: Path) -> None:
    """A way of truncation like the other; TRL warns that it will be removed."""
    ours, theirs = (classes(library, "dpo")[0] for library in ("prefopt", "trl"))
    with pytest.warns(FutureWarning, match=r"keep_end.*deprecated"):
        theirs(str(tmp_path), truncation_mode="keep_end", bf16=False)
    assert ours(str(tmp_path), truncation_mode="keep_end", bf16=False).truncation_mode == "keep_end"


def test_packed_batches() -> None:
    """``padding_free`` packs; TRL warns and pads. The numbers are the same."""
    config = {"padding_free": True}
    trainer = build("prefopt", "dpo", config, ref_model=tiny_model(**REFERENCE))
    assert trainer.args.padding_free
    packed = run("prefopt", "dpo", config, ref_model=tiny_model(**REFERENCE))
    padded = run("trl", "dpo", config, ref_model=tiny_model(**REFERENCE))
    assert [row["loss"] for row in packed] == pytest.approx([row["loss"] for row in padded], rel=1e-3)


def test_cpo_loads_weights_in_float32(tmp_path: Path) -> None:
    """A checkpoint in bfloat16, given by its path: float32 in all three trainers; TRL's CPO keeps bfloat16."""
    tiny_model(**POLICY).to(torch.bfloat16).save_pretrained(tmp_path)
    assert build("prefopt", "cpo", {}, model=str(tmp_path)).model.dtype == torch.float32
    assert build("trl", "cpo", {}, model=str(tmp_path)).model.dtype == torch.bfloat16


def test_cpo_without_a_limit_cuts_nothing() -> None:
    """``max_length=None``: no limit. TRL's CPO takes 512."""
    rows = standard_rows(2)
    rows["chosen"] = [completion + " baba" * 600 for completion in rows["chosen"]]
    arguments = {"train_dataset": Dataset.from_dict(rows)}
    whole = len(word_tokenizer()(rows["prompt"][0] + rows["chosen"][0] + "</s>")["input_ids"])
    ours = build("prefopt", "cpo", {"max_length": None}, **arguments).train_dataset[0]
    theirs = build("trl", "cpo", {"max_length": None}, **arguments).train_dataset[0]
    assert len(ours["prompt_ids"]) + len(ours["chosen_ids"]) == whole
    assert len(theirs["chosen_input_ids"]) == 512


def test_options_of_loading_beside_a_loaded_model_are_ignored_by_cpo_too() -> None:
    config = {"model_init_kwargs": {"dtype": "float16"}}
    assert build("prefopt", "cpo", config).model.dtype == torch.float32
    with pytest.raises(ValueError, match="already instantiated"):
        build("trl", "cpo", config)
