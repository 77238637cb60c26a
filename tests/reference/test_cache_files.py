"""The cache on disk: what is written, what is never read, and a data set from beginning to end."""

from __future__ import annotations

import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from reference_models import batch_of, example, one_weight, rows, tiny_llama

from prefopt.batching.padded import pad_batch
from prefopt.reference import (
    ReferenceCache,
    Remembered,
    cache_folder,
    make_reference,
    missing_rows,
    row_keys,
    with_reference_logps,
)
from prefopt.types import PAIR

KEYS = [bytes([number]) * 16 for number in range(4)]
ENTRIES = {key: (-1.5 - number, -2.25 - number / 3) for number, key in enumerate(KEYS)}


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


def precompute(model: Any, dataset: Dataset) -> tuple[Dataset, int]:
    """What the trainer does, with batches of 3; the set, and how many rows were scored."""
    memory = make_reference(model, remember=True)
    assert isinstance(memory, Remembered)
    cache, keys = memory.opened(), row_keys(dataset)
    todo = missing_rows(cache, keys)
    for start in range(0, len(todo), 3):
        chosen = [dataset[index] for index in todo[start : start + 3]]
        memory(replace(pad_batch([example(row) for row in chosen], PAIR), keys=tuple(row_keys(chosen))))
    memory.settle()
    cache.flush()
    return with_reference_logps(dataset, keys, cache), len(todo)


def test_precomputed_log_probs_are_those_of_the_reference() -> None:
    model, made = tiny_llama(), rows(7)
    dataset, scored = precompute(model, Dataset.from_list(made))
    assert scored == 7
    wanted = make_reference(model)(batch_of(made))
    for branch in PAIR:
        assert dataset[f"ref_{branch}_logps"][:] == pytest.approx(wanted[branch].sum_logps.tolist(), rel=1e-5)


def test_the_second_run_computes_only_what_is_new(reference_cache: Path) -> None:
    """Rows in another order, one of them twice, two of them new; then another model."""
    made = rows(9)
    first, _ = precompute(tiny_llama(), Dataset.from_list(made[:7]))
    again = [made[number] for number in (8, 3, 0, 8, 7, 5)]
    for number, row in enumerate(again):
        again[number] = {**row, "row": number}
    second, scored = precompute(tiny_llama(), Dataset.from_list(again))
    assert scored == 2
    assert second["ref_chosen_logps"][1] == first["ref_chosen_logps"][3]
    assert second["ref_chosen_logps"][0] == second["ref_chosen_logps"][3]
    third, scored = precompute(tiny_llama(), second)
    assert scored == 0
    assert third["ref_rejected_logps"][:] == second["ref_rejected_logps"][:]
    _, scored = precompute(one_weight(tiny_llama()), second)
    assert scored == 5


def test_missing_log_probs_are_counted(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "a")
    cache.put({KEYS[0]: (-1.0, -2.0)})
    with pytest.raises(ValueError, match="2 of 3 rows have no reference log-probs, the first at index 1"):
        with_reference_logps(Dataset.from_list(rows(3)), KEYS[:3], cache)
