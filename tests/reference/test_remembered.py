"""A reference that remembers gives every pair one value for ever, and asks its model once for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import batch_of, log_probs, one_weight, policy_stats, rows, shake, tiny_llama

from prefopt.reference import ReferenceCache, Remembered, make_reference, row_keys
from prefopt.reference.policy import ModelReference, SeparateModel
from prefopt.types import PAIR, PreferenceBatch, SequenceStats

ROWS = rows(8)


class Drifting(SeparateModel):
    """A model whose every answer is one nat above the one before, so that it shows which one was given."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model or tiny_llama(), derives_from_policy=True)
        self.calls = 0

    def __call__(self, batch: PreferenceBatch) -> Any:
        self.calls += 1
        return {
            branch: replace(stats, sum_logps=stats.sum_logps + self.calls)
            for branch, stats in super().__call__(batch).items()
        }


def keyed(*numbers: int, weight: float = 1.0) -> PreferenceBatch:
    """The batch of these of `ROWS`."""
    chosen = [ROWS[number] for number in numbers]
    return replace(batch_of(chosen, weight=weight), keys=tuple(row_keys(chosen)))


def asked(memory: Remembered, batch: PreferenceBatch) -> tuple[torch.Tensor, int]:
    """What it gives, and how often its model was asked for that."""
    assert isinstance(memory.source, Drifting)
    before = memory.source.calls
    return log_probs(memory(batch)), memory.source.calls - before


def written(memory: Remembered) -> None:
    """What a run of one process does at the end of an epoch."""
    entries, complaint = memory.take()
    assert complaint is None
    memory.opened().put(entries)
    memory.opened().flush()


def test_a_pair_is_scored_once_also_in_other_company() -> None:
    memory = Remembered(Drifting())
    first, calls = asked(memory, keyed(0, 1, 2))
    assert calls == 1
    again, calls = asked(memory, keyed(2, 0))
    assert calls == 0
    assert torch.equal(again, first[:, [2, 0]])
    assert torch.equal(first, log_probs(policy_stats(tiny_llama(), keyed(0, 1, 2))) + 1)


def test_num_tokens_are_those_of_the_batch() -> None:
    memory = Remembered(Drifting())
    for batch in (keyed(0, 1), keyed(1, 0)):
        stats = memory(batch)
        expected = memory.source(batch)
        for branch in PAIR:
            assert torch.equal(stats[branch].num_tokens, expected[branch].num_tokens)


def test_the_first_value_of_a_pair_stays() -> None:
    """A micro-batch with one unknown pair is scored as a whole, and the known pairs keep what they had."""
    memory = Remembered(Drifting())
    first, _ = asked(memory, keyed(0, 1))
    mixed, calls = asked(memory, keyed(1, 2))
    assert calls == 1
    assert torch.equal(mixed[:, 0], first[:, 1])
    both, calls = asked(memory, keyed(2, 1, 0))
    assert calls == 0
    assert torch.equal(both, torch.stack([mixed[:, 1], first[:, 1], first[:, 0]], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_read_back_has_the_bits_that_were_computed(dtype: torch.dtype, reference_cache: Path) -> None:
    before, after = (Remembered(Drifting(tiny_llama(dtype=dtype))) for _ in range(2))
    computed, _ = asked(before, keyed(0, 1, 2))
    written(before)
    assert any(reference_cache.rglob("*.safetensors"))
    read, calls = asked(after, keyed(1, 2, 0))
    assert calls == 0
    assert read.dtype == computed.dtype
    assert torch.equal(read, computed[:, [1, 2, 0]])


def test_a_value_in_memory_is_not_replaced_by_one_on_the_disk(reference_cache: Path) -> None:
    """Another process may have scored the same pair in other company, with other rounding."""
    memory, other = Remembered(Drifting()), Remembered(Drifting())
    mine, _ = asked(memory, keyed(0))
    asked(other, keyed(3))
    theirs, _ = asked(other, keyed(0))
    assert not torch.equal(mine, theirs)
    written(other)
    memory.take()
    memory.begin()
    assert torch.equal(asked(memory, keyed(0))[0], mine)


class OnAccelerator(SeparateModel):
    """Log-probs without values, as on a device whose work is still to be done: to read one fails."""

    def __call__(self, batch: PreferenceBatch) -> Any:
        tokens = torch.ones(batch.layout.num_pairs, device="meta")
        return {branch: SequenceStats(tokens, tokens) for branch in PAIR}


def test_nothing_waits_for_the_device(reference_cache: Path) -> None:
    model = tiny_llama()
    cache = ReferenceCache(None, make_reference(model).fingerprint())
    cache.put({keyed(0).keys[0]: (-1.0, -2.0), keyed(1).keys[0]: (-3.0, -4.0)})
    cache.flush()
    memory = Remembered(OnAccelerator(model, derives_from_policy=True))
    for numbers in ((0, 1), (1, 2), (3, 4)):  # all known, one known, none
        batch = keyed(*numbers).to("meta")
        assert all(stats.sum_logps.is_meta for stats in memory(batch).values())
    with pytest.raises(NotImplementedError, match="meta"):
        memory.settle()


def test_only_so_many_micro_batches_wait_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.reference.remembered.MOST_SCORED", 2)
    memory = Remembered(Drifting())
    waiting = []
    for number in range(5):
        memory(keyed(number))
        waiting.append(len(memory.scored))
    assert waiting == [1, 2, 1, 2, 1]
    assert asked(memory, keyed(0, 1, 2, 3, 4))[1] == 0


def test_a_dummy_is_looked_up_but_not_remembered() -> None:
    memory = Remembered(Drifting())
    assert asked(memory, keyed(0, weight=0.0))[1] == 1
    value, calls = asked(memory, keyed(0))
    assert calls == 1
    assert torch.equal(asked(memory, keyed(0, weight=0.0))[0], value)
    assert memory.source.calls == 2  # type: ignore[attr-defined]


def test_a_batch_without_keys_is_computed_every_time() -> None:
    memory = Remembered(Drifting())
    assert [asked(memory, batch_of())[1] for _ in range(3)] == [1, 1, 1]
    assert memory.cache is None


def test_a_log_prob_that_is_not_finite_is_named_and_not_remembered() -> None:
    class Broken(Drifting):
        def __call__(self, batch: PreferenceBatch) -> Any:
            stats = super().__call__(batch)
            chosen = stats["chosen"].sum_logps.clone()
            chosen[1] = float("nan")
            return {**stats, "chosen": replace(stats["chosen"], sum_logps=chosen)}

    memory = Remembered(Broken())
    memory(keyed(3, 5, 2))
    entries, complaint = memory.take()
    assert list(entries) == [*keyed(3).keys, *keyed(2).keys]
    assert complaint is not None
    assert "gives row 5 the log-probs (nan, -" in complaint
    assert memory.take() == ({}, None)
    assert asked(memory, keyed(3, 2))[1] == 0
    assert asked(memory, keyed(0, 5))[1] == 1


def test_a_run_with_other_weights_or_another_precision_remembers_nothing(reference_cache: Path) -> None:
    memory = Remembered(Drifting())
    memory.begin(autocast="no")
    asked(memory, keyed(0))
    written(memory)
    one_weight(memory.source.model)
    memory.begin(autocast="no")
    assert asked(memory, keyed(0))[1] == 1
    assert asked(memory, keyed(0))[1] == 0
    memory.begin(autocast="bf16")
    assert asked(memory, keyed(0))[1] == 1
    one_weight(memory.source.model)  # back to the first
    memory.begin(autocast="no")
    assert asked(memory, keyed(0))[1] == 0


def test_weights_that_are_not_there_are_not_remembered(caplog: pytest.LogCaptureFixture) -> None:
    class Offloaded(Drifting):
        def fingerprint(self, **settings: object) -> str:
            raise ValueError("The weight 'x' is not loaded.")

    memory = Remembered(Offloaded())
    with caplog.at_level(logging.WARNING):
        assert [asked(memory, keyed(0))[1] for _ in range(2)] == [1, 1]
    assert caplog.text.count("in every epoch. The weight 'x' is not loaded.") == 1


def test_the_policy_it_shares_a_model_with_may_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint is of the adapter's start, whenever it is taken."""
    from reference_models import adapted, lora

    asked_for: list[int] = []
    original = ModelReference.__call__
    monkeypatch.setattr(ModelReference, "__call__", lambda self, batch: asked_for.append(1) or original(self, batch))
    for config in (lora(), lora(init_lora_weights=False)):
        model = adapted(config)
        memory = make_reference(model, remember=True)
        start = log_probs(memory(keyed(0, 1)))
        shake(model)
        memory.begin()
        assert torch.equal(log_probs(memory(keyed(1, 0))), start[:, [1, 0]])
    assert len(asked_for) == 2


def test_no_folder_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored before training is known for the run all the same."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for value, files in (("off", 0), ("", 1)):
        monkeypatch.setenv("PREFOPT_CACHE", value)
        memory = Remembered(Drifting())
        asked(memory, keyed(0))
        written(memory)
        assert asked(memory, keyed(0))[1] == 0
        assert len(list(tmp_path.rglob("*.safetensors"))) == files


@pytest.mark.parametrize("move", [lambda p: p.data.mul_(1.001), lambda p: p.requires_grad_(False).mul_(1.001)])
def test_weights_that_move_within_a_run_are_noticed(move: Any) -> None:
    memory = Remembered(Drifting())
    memory(keyed(0))
    memory.take()
    memory(keyed(1))
    for parameter in memory.source.model.parameters():
        move(parameter)
    with pytest.raises(ValueError, match="weights have changed during the run"):
        memory.take()
