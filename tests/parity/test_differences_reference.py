"""The reference policy: cases in which TRL 1.16 takes another model, an old number, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from independent import lengths, score_rows, sums
from parity_harness import POLICY, REFERENCE, RELATIVE, build, run
from tiny_models import standard_rows, tiny_model, word_tokenizer

from prefopt import BEMACallback

pytestmark = pytest.mark.trl


def moved(model: Any) -> Any:
    """The model with other weights than the folder it came from: merged, resized or trained further."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_reference_is_the_model_that_was_given(policy_path: str) -> None:
    """TRL reloads the reference from the model's path: the margin at step 0 is not zero."""
    from transformers import AutoModelForCausalLM

    def margin(library: str) -> float:
        model = moved(AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32))
        return run(library, "dpo", {"max_steps": 1}, model=model)[0]["rewards/margins"]

    assert margin("prefopt") == pytest.approx(0.0, abs=1e-6)
    assert abs(margin("trl")) > 1e-2


def test_a_model_without_a_path_has_a_reference() -> None:
    log = run("prefopt", "dpo", {}, model=tiny_model(**POLICY))
    assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert log[2]["rewards/margins"] != 0.0
    with pytest.raises(OSError, match="Repo id"):
        build("trl", "dpo", {}, model=tiny_model(**POLICY))


def test_a_reference_that_is_the_policy_is_a_snapshot_of_it(policy_path: str) -> None:
    """The same object given twice: its starting weights are the reference. TRL refuses."""
    policy = tiny_model(**POLICY)
    log = run("prefopt", "dpo", {}, model=policy, ref_model=policy)
    alone = run("prefopt", "dpo", {}, model=policy_path)
    assert [row["rewards/margins"] for row in log] == pytest.approx([row["rewards/margins"] for row in alone], abs=1e-5)
    assert abs(log[2]["rewards/margins"]) > 1e-3
    policy = tiny_model(**POLICY)
    with pytest.raises(ValueError, match="cannot be the same object"):
        build("trl", "dpo", {}, model=policy, ref_model=policy)


def test_precomputed_log_probs_are_never_stale(tmp_path: Path) -> None:
    """A second run with another ``ld_alpha``: TRL's cache key does not hold it, and the old sums come back."""
    rows = standard_rows(4)
    file = tmp_path / "pairs.jsonl"
    Dataset.from_dict(rows).to_json(file)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    config = {"precompute_ref_log_probs": True, "max_length": None, "max_steps": 1}

    def rewards(library: str, ld_alpha: float | None) -> float:
        arguments = {"ref_model": tiny_model(**REFERENCE), "train_dataset": data}
        return run(library, "dpo", {**config, "ld_alpha": ld_alpha}, **arguments)[0]["rewards/rejected"]

    policy, reference = (score_rows(tiny_model(**settings), word_tokenizer(), rows) for settings in (POLICY, REFERENCE))
    shared = torch.minimum(lengths(policy["chosen"]), lengths(policy["rejected"])).long()
    heads = [
        sum(float(completion.logps[:m].sum()) for completion, m in zip(scores["rejected"], shared, strict=True)) / 4
        for scores in (policy, reference)
    ]
    right = 0.1 * (heads[0] - heads[1])
    for library in ("trl", "prefopt"):
        expected = 0.1 * float((sums(policy["rejected"]) - sums(reference["rejected"])).mean())
        assert rewards(library, None) == pytest.approx(expected, rel=RELATIVE)
    assert rewards("prefopt", 0.0) == pytest.approx(right, rel=RELATIVE)
    assert rewards("trl", 0.0) != pytest.approx(right, rel=10 * RELATIVE)


def test_the_reference_is_asked_once_for_each_pair(reference_cache: Path) -> None:
    """Two epochs, an evaluation of the same rows, and a second run with another beta. TRL computes it every time."""

    def asked(library: str, beta: float) -> tuple[int, float]:
        reference, calls = tiny_model(**REFERENCE), []
        rows = Dataset.from_dict(standard_rows(8))
        config = {"max_steps": -1, "num_train_epochs": 2, "beta": beta}
        trainer = build(library, "dpo", config, ref_model=reference, train_dataset=rows, eval_dataset=rows)
        reference.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        margin = trainer.evaluate()["eval_rewards/margins"]
        return len(calls), margin

    for beta, of_trl, of_prefopt in ((0.1, 5, 2), (0.3, 5, 0)):
        (theirs, margin), (ours, our_margin) = asked("trl", beta), asked("prefopt", beta)
        assert (theirs, ours) == (of_trl, of_prefopt)
        assert our_margin == pytest.approx(margin, rel=10 * RELATIVE)
        assert abs(margin) > 1e-3


def test_precompute_takes_streams(policy_path: str) -> None:
    """Computed when a batch is first seen; the same numbers as without precompute. TRL refuses."""
    config = {"precompute_ref_log_probs": True}

    def stream() -> dict[str, Any]:
        return {"model": policy_path, "train_dataset": Dataset.from_dict(standard_rows()).to_iterable_dataset()}

    streamed = run("prefopt", "dpo", config, **stream())
    usual = run("prefopt", "dpo", {}, model=policy_path)
    assert [row["loss"] for row in streamed] == pytest.approx([row["loss"] for row in usual], rel=RELATIVE)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with IterableDataset"):
        build("trl", "dpo", config, **stream())


def test_precompute_takes_a_new_set_after_training(policy_path: str) -> None:
    """The starting weights are still known after training. TRL has given them up and refuses."""
    data = Dataset.from_dict(standard_rows(4, seed=5))

    def margins(library: str, precompute: bool) -> float:
        trainer = build(library, "dpo", {"precompute_ref_log_probs": precompute}, model=policy_path)
        trainer.train()
        return trainer.evaluate(data)["eval_rewards/margins"]

    assert margins("prefopt", True) == pytest.approx(margins("trl", False), rel=RELATIVE, abs=1e-4)
    with pytest.raises(ValueError, match="Cannot compute reference log-probs"):
        margins("trl", True)


def test_tr_dpo_goes_with_adapters(policy_path: str) -> None:
    """The reference adapter follows the policy's: its rewards shrink against a fixed reference."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    arguments = {"model": policy_path, "peft_config": adapter}
    config = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "learning_rate": 3.0}
    followed = run("prefopt", "dpo", config, **arguments)
    fixed = run("prefopt", "dpo", {"learning_rate": 3.0}, **arguments)
    assert followed[2]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert abs(fixed[2]["rewards/chosen"]) > 1e-3
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        build("trl", "dpo", config, **arguments)


def test_bema_for_the_reference_goes_with_adapters(policy_path: str) -> None:
    """kappa 0 and a large eta: the average is the policy, so against a reference that takes it rewards are 0."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    arguments = {"model": policy_path, "peft_config": adapter}
    options = {"ema_power": 0.0, "bias_power": 8.0, "update_ref_model": True, "ref_model_update_freq": 1}
    followed = run("prefopt", "dpo", {"learning_rate": 3.0}, callbacks=[BEMACallback(1, **options)], **arguments)
    assert followed[2]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    fixed = run("prefopt", "dpo", {"learning_rate": 3.0}, **arguments)
    assert abs(fixed[2]["rewards/chosen"]) > 1e-3
    theirs = pytest.importorskip("trl.experimental.bema_for_ref_model")
    callback = theirs.BEMACallback(1, **options)
    trainer = build("trl", "dpo", {}, trainer_class=theirs.DPOTrainer, callbacks=[callback], **arguments)
    with pytest.raises(TypeError):
        trainer.train()


def lora(*modules: str) -> Any:
    """An adapter that is no identity at the start."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM")


def wrapped(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_model(**POLICY), lora("q_proj"), **settings)


ACTIVE: dict[str, Callable[[], Any]] = {
    "LoRA without zeros": lambda: lora("q_proj"),
    "prompt tuning": lambda: peft_config("PromptTuningConfig"),
    "prefix tuning": lambda: peft_config("PrefixTuningConfig"),
}


def peft_config(kind: str) -> Any:
    return getattr(pytest.importorskip("peft"), kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("kind", ACTIVE)
def test_a_new_adapter_that_acts_from_the_start_is_part_of_the_reference(kind: str, policy_path: str) -> None:
    """TRL switches the adapter off for the reference: a margin before anything was learned."""
    arguments = {"model": policy_path, "peft_config": ACTIVE[kind]()}
    ours, theirs = (
        run(library, "dpo", {"max_steps": 1}, **arguments)[0]["rewards/margins"] for library in ("prefopt", "trl")
    )
    assert ours == pytest.approx(0.0, abs=1e-6)
    assert abs(theirs) > 1e-2


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception]]] = {
    "adapter on the head": (lambda: {"peft_config": lora("q_proj", "lm_head")}, ValueError),
    "adapter of another name": (lambda: {"model": wrapped(adapter_name="mine")}, KeyError),
    "new adapter on an adapted model": (lambda: {"model": wrapped(), "peft_config": lora("v_proj")}, ValueError),
    "adapted model as reference": (lambda: {"ref_model": wrapped()}, AttributeError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_trl_refuses(case: str, policy_path: str) -> None:
    arguments, error = REFUSED[case]
    with pytest.raises(error):
        run("trl", "dpo", {}, **{"model": policy_path} | arguments())
    log = run("prefopt", "dpo", {}, **{"model": policy_path} | arguments())
    if case != "adapted model as reference":
        assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert log[2]["loss"] != pytest.approx(log[0]["loss"], rel=1e-4)
