"""The cache finds what was scored by the same reference, and nothing else; a damaged file is never believed."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference_models import adapted, batch_of, example, lora, rows, shake, tiny_llama, two_adapters

from prefopt.batching.padded import pad_batch
from prefopt.reference import (
    ReferenceCache,
    cache_folder,
    fingerprint,
    make_reference,
    missing_rows,
    record,
    row_keys,
    with_reference_logps,
)
from prefopt.reference.precompute import row_key
from prefopt.types import PAIR, SequenceStats

ROW = {
    "row": 3,
    "prompt_ids": [5, 6, 7],
    "chosen_ids": [8, 9],
    "chosen_mask": [True, True],
    "chosen_prompt_start": 0,
    "rejected_ids": [10, 11, 12],
    "rejected_mask": [True, True, True],
    "rejected_prompt_start": 1,
}
KEYS = [bytes([number]) * 16 for number in range(4)]
ENTRIES = {key: (-1.5 - number, -2.25 - number / 3) for number, key in enumerate(KEYS)}


# -- what is in the key ----------------------------------------------------------------------------------------------

ROW_CHANGES: dict[str, dict[str, Any]] = {
    "prompt ids": {"prompt_ids": [5, 6, 13]},
    "prompt and completion moved": {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9]},
    "chosen ids": {"chosen_ids": [8, 13]},
    "rejected ids": {"rejected_ids": [10, 11]},
    "chosen mask": {"chosen_mask": [False, True]},
    "rejected mask": {"rejected_mask": [True, True, False]},
    "sides swapped": {"chosen_ids": [10, 11, 12], "rejected_ids": [8, 9]},
    "truncation of a prompt": {"rejected_prompt_start": 0},
    "images": {"images": [np.zeros((2, 2, 3), dtype=np.uint8)]},
}


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_what_is_scored_changes_the_key(change: str) -> None:
    assert row_key({**ROW, **ROW_CHANGES[change]}) != row_key(ROW)


def test_ld_alpha_changes_the_key() -> None:
    assert len({row_key(ROW), row_key(ROW, ld_alpha=0.0), row_key(ROW, ld_alpha=0.5)}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"row": 4},
        {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0},
        {"prompt_ids": np.array([5, 6, 7], dtype=np.int32), "chosen_mask": np.array([True, True])},
        {"prompt_ids": torch.tensor([5, 6, 7])},
        {"chosen_mask": [1, 1]},
    ],
)
def test_what_is_not_scored_leaves_the_key(change: dict[str, Any]) -> None:
    assert row_key({**ROW, **change}) == row_key(ROW)


def test_keys_survive_the_disk(tmp_path: Path) -> None:
    prepared = rows()
    Dataset.from_list(prepared).save_to_disk(str(tmp_path))
    assert row_keys(Dataset.load_from_disk(str(tmp_path))) == row_keys(prepared)


def test_a_column_without_a_canonical_form_is_named() -> None:
    with pytest.raises(TypeError, match="Column 'extra' of row 3 holds object"):
        row_key({**ROW, "extra": object()})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, "None"),
        ("1", 1),
        ([1, "a"], ["1", "a"]),
        ([[1], [2, 3]], [[1, 2], [3]]),
        (b"a", "a"),
        ([], [[]]),
        (0, [0]),
    ],
)
def test_unequal_values_have_unequal_forms(one: Any, other: Any) -> None:
    assert row_key({"column": one}) != row_key({"column": other})


def one_weight(model: Any) -> Any:
    """The smallest change there is: the last bit of one number."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 3] ^= 1
    return model


def adapter_weight(model: Any) -> Any:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).view(torch.int32)[0, 0] ^= 1
    return model


def rescaled(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    return model


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def first_active(model: Any) -> Any:
    model.set_adapter("first")
    return model


MODEL_CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "one bit of a weight": (tiny_llama, lambda: one_weight(tiny_llama())),
    "precision": (tiny_llama, lambda: tiny_llama(dtype=torch.bfloat16)),
    "attention implementation": (tiny_llama, lambda: eager(tiny_llama())),
    "config": (tiny_llama, lambda: tiny_llama(rms_norm_eps=1e-5)),
    "an adapter that acts": (tiny_llama, lambda: adapted(lora(), trained=True)),
    "one bit of an adapter": (
        lambda: adapted(lora(), trained=True),
        lambda: adapter_weight(adapted(lora(), trained=True)),
    ),
    "an adapter's alpha": (lambda: adapted(lora(), trained=True), lambda: adapted(lora(lora_alpha=16), trained=True)),
    "an adapter's scale": (lambda: adapted(lora(), trained=True), lambda: rescaled(adapted(lora(), trained=True))),
    "the active adapter": (two_adapters, lambda: first_active(two_adapters())),
    "both adapters active": (two_adapters, lambda: two_adapters(both=True)),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_what_scores_changes_the_fingerprint(change: str) -> None:
    before, after = (make() for make in MODEL_CHANGES[change])
    assert fingerprint(before) == fingerprint(MODEL_CHANGES[change][0]())
    assert fingerprint(before) != fingerprint(after)


def test_the_autocast_type_changes_the_fingerprint() -> None:
    model = tiny_llama()
    assert len({fingerprint(model), fingerprint(model, autocast="bf16"), fingerprint(model, autocast="fp16")}) == 3


def test_library_versions_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(tiny_llama())
    monkeypatch.setattr("transformers.__version__", "0.0")
    assert fingerprint(tiny_llama()) != before


def test_a_switched_off_adapter_is_the_base_model() -> None:
    """The random numbers that a new adapter starts with, its rank and its name play no part."""
    base = fingerprint(tiny_llama())
    for config in (lora(), lora(r=2, use_rslora=True), lora(modules_to_save=["lm_head"])):
        assert make_reference(adapted(config)).fingerprint() == base
    assert make_reference(adapted(lora(), name="mine")).fingerprint() == base


def test_a_copy_has_the_fingerprint_of_what_was_copied() -> None:
    model = adapted(lora(), trained=True)
    before, reference = fingerprint(model), make_reference(model)
    shake(model)
    assert reference.fingerprint() == before != fingerprint(model)


def test_training_state_does_not_enter() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    model.train().requires_grad_(False)
    model.config.use_cache = False
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == before


def test_a_model_that_is_not_loaded_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="not loaded"):
        fingerprint(tiny_llama().to("meta"))


def test_large_tensors_are_hashed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(tiny_llama())
    monkeypatch.setattr("prefopt.reference.fingerprints.CHUNK", 100)
    assert fingerprint(tiny_llama()) == before
    assert fingerprint(one_weight(tiny_llama())) != before


# -- the files -------------------------------------------------------------------------------------------------------


def written(folder: Path, reference: str = "a") -> Path:
    cache = ReferenceCache(folder, reference)
    cache.put(ENTRIES)
    cache.flush()
    (path,) = cache.folder.iterdir()
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written(tmp_path)
    cache = ReferenceCache(tmp_path, "a")
    assert len(cache) == 4
    assert KEYS[2] in cache
    assert cache.get([KEYS[1], b"?" * 16]) == [{"chosen": -2.5, "rejected": -2.25 - 1 / 3}, None]


def test_another_reference_finds_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "a")
    other = ReferenceCache(tmp_path, "b")
    assert len(other) == 0
    other.folder.mkdir(parents=True)
    (other.folder / path.name).write_bytes(path.read_bytes())
    other.reload()
    assert len(other) == 0


def test_what_was_not_flushed_is_there_meanwhile(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "a")
    cache.put({KEYS[0]: (-1.0, -2.0)})
    assert cache.get([KEYS[0]]) == [{"chosen": -1.0, "rejected": -2.0}]
    assert cache.pending == {KEYS[0]: (-1.0, -2.0)}
    assert not cache.folder.exists()
    cache.flush()
    assert cache.pending == {}
    cache.flush()
    assert len(list(cache.folder.iterdir())) == 1


def damaged(content: bytes) -> list[bytes]:
    flips = [content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(len(content))]
    cuts = [content[:length] for length in range(0, len(content), 7)]
    return [*flips, *cuts, content + b"\0"]


def test_no_damaged_file_is_read(tmp_path: Path) -> None:
    """Every byte with a bit flipped, cut at every seventh byte, empty, one byte too long."""
    path = written(tmp_path)
    content = path.read_bytes()
    for broken in damaged(content):
        path.write_bytes(broken)
        assert len(ReferenceCache(tmp_path, "a")) == 0
    path.write_bytes(content)
    assert len(ReferenceCache(tmp_path, "a")) == 4


def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    cache = ReferenceCache(tmp_path, "a")
    cache.put({KEYS[0]: ENTRIES[KEYS[0]]})
    cache.flush()
    with caplog.at_level(logging.WARNING):
        assert len(ReferenceCache(tmp_path, "a")) == 1
    assert path.name in caplog.text


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_and_does_not_stop_the_run(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = ReferenceCache(tmp_path, "a")
    cache.put(ENTRIES)
    monkeypatch.setattr(os, step, full)
    with caplog.at_level(logging.WARNING):
        cache.flush()
    assert "No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []
    assert len(cache) == 4


def test_a_file_being_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill between write and rename leaves behind."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path)
    (left,) = (tmp_path / "reference_logps" / "a").iterdir()
    assert left.stat().st_size > 0
    assert len(ReferenceCache(tmp_path, "a")) == 0


def write_many(folder: Path, process: int) -> None:
    cache = ReferenceCache(folder, "a")
    for number in range(20):
        key = number.to_bytes(8, "big") + (process if number % 2 else 0).to_bytes(8, "big")
        cache.put({key: (-float(number), -float(process if number % 2 else 0))})
        cache.flush()


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    """Half of the entries are the same in both, so that they also write the same file."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(tmp_path, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = ReferenceCache(tmp_path, "a")
    assert len(cache) == 10 + 2 * 10
    assert all(path.suffix == ".safetensors" for path in cache.folder.iterdir())


def test_reload_sees_what_another_process_wrote(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "a")
    written(tmp_path)
    assert len(cache) == 0
    cache.reload()
    assert len(cache) == 4


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "prefopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "prefopt"
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "own"))
    assert ReferenceCache(None, "a").folder == tmp_path / "own" / "reference_logps" / "a"


# -- a data set from beginning to end ------------------------------------------------------------------------------


def precompute(model: Any, dataset: Dataset, folder: Path) -> tuple[Dataset, int]:
    """What the trainer does, with batches of 3; the set, and how many rows were scored."""
    reference = make_reference(model)
    cache = ReferenceCache(folder, reference.fingerprint())
    keys = row_keys(dataset)
    key_of_row = dict(zip(dataset["row"], keys, strict=True))
    todo = missing_rows(cache, keys)
    for start in range(0, len(todo), 3):
        batch = pad_batch([example(dataset[index]) for index in todo[start : start + 3]], PAIR)
        record(cache, key_of_row, batch, reference(batch))
    cache.flush()
    return with_reference_logps(dataset, keys, cache), len(todo)


def test_precomputed_log_probs_are_those_of_the_reference(tmp_path: Path) -> None:
    model, made = tiny_llama(), rows(7)
    dataset, scored = precompute(model, Dataset.from_list(made), tmp_path)
    assert scored == 7
    wanted = make_reference(model)(batch_of(made))
    for branch in PAIR:
        assert dataset[f"ref_{branch}_logps"][:] == pytest.approx(wanted[branch].sum_logps.tolist(), rel=1e-5)


def test_the_second_run_computes_only_what_is_new(tmp_path: Path) -> None:
    """Rows in another order, one of them twice, two of them new; then another model."""
    made = rows(9)
    first, _ = precompute(tiny_llama(), Dataset.from_list(made[:7]), tmp_path)
    again = [made[number] for number in (8, 3, 0, 8, 7, 5)]
    for number, row in enumerate(again):
        again[number] = {**row, "row": number}
    second, scored = precompute(tiny_llama(), Dataset.from_list(again), tmp_path)
    assert scored == 2
    assert second["ref_chosen_logps"][1] == first["ref_chosen_logps"][3]
    assert second["ref_chosen_logps"][0] == second["ref_chosen_logps"][3]
    third, scored = precompute(tiny_llama(), second, tmp_path)
    assert scored == 0
    assert third["ref_rejected_logps"][:] == second["ref_rejected_logps"][:]
    _, scored = precompute(one_weight(tiny_llama()), second, tmp_path)
    assert scored == 5


def test_dummies_are_not_recorded(tmp_path: Path) -> None:
    cache, batch = ReferenceCache(tmp_path, "a"), batch_of(weight=0.0)
    record(cache, {}, batch, make_reference(tiny_llama())(batch))
    assert len(cache) == 0


def test_a_nan_is_not_recorded(tmp_path: Path) -> None:
    cache, batch = ReferenceCache(tmp_path, "a"), batch_of()
    stats = dict(make_reference(tiny_llama())(batch))
    bad = stats["rejected"].sum_logps.clone()
    bad[2] = float("nan")
    stats["rejected"] = replace(stats["rejected"], sum_logps=bad)
    with pytest.raises(ValueError, match=r"gives row 2 the log-probs \(-\d+\.\d+, nan\)"):
        record(cache, dict(enumerate(KEYS)), batch, stats)


def test_missing_log_probs_are_counted(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "a")
    cache.put({KEYS[0]: (-1.0, -2.0)})
    with pytest.raises(ValueError, match="2 of 3 rows have no reference log-probs, the first at index 1"):
        with_reference_logps(Dataset.from_list(rows(3)), KEYS[:3], cache)


def test_stats_of_one_pair_go_to_its_row(tmp_path: Path) -> None:
    """By hand: three pairs, the middle one a dummy, rows in any order."""
    cache = ReferenceCache(tmp_path, "a")
    batch = replace(batch_of(rows(3)), rows=(9, -1, 4), pair_weights=torch.tensor([1.0, 0.0, 1.0]))
    tokens = torch.ones(3)
    stats = {
        "chosen": SequenceStats(torch.tensor([-1.0, -2.0, -3.0]), tokens),
        "rejected": SequenceStats(torch.tensor([-4.0, -5.0, -6.0]), tokens),
    }
    record(cache, {9: KEYS[0], 4: KEYS[1]}, batch, stats)
    assert cache.pending == {KEYS[0]: (-1.0, -4.0), KEYS[1]: (-3.0, -6.0)}
