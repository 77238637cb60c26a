"""What real runs leave for their reports: options, data, times, the worst and best pairs, and the page itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from short_runs import dataset, trainer
from transformers import TrainerCallback

from prefopt.report.folder import REPORT, read_rows
from prefopt.trainer.ending import pairs as pairs_module
from prefopt.trainer.ending import reporting
from prefopt.trainer.ending.describing import Clock
from prefopt.trainer.ending.pairs import NUM_KEPT, PAIRS, Extremes, ScoredPairs, write_pairs
from prefopt.trainer.saving import pushing

ROUNDING = 1e-5
"""Of float32 rewards of order 1, whose batches differ."""


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reporting.VARIABLE, "on")


class Ending(TrainerCallback):
    """Ends a run in its third step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise self.error


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_report(tmp_path: Path, reported: None) -> None:
    rows = dataset(20)
    same = {name: rows[name][0] for name in rows.column_names} | {"rejected": rows["chosen"][0]}
    options: dict[str, Any] = {"eval_dataset": dataset(12, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path / "run", max_steps=4, rows=rows.add_item(same), generate_during_eval=True, **options)
    run.train()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["options"]["max_steps"] == 4
    assert {"max_steps", "eval_steps"} <= set(record["options_set"])
    assert "weight_decay" not in record["options_set"]
    train = record["data"]["train"]
    assert (train["rows"], train["kept"], record["data"]["eval"]["kept"]) == (21, 20, 12)
    assert train["skipped"] == {"chosen equal to rejected": {"num": 1, "rows": [20]}}
    timing = record["timing"]
    assert (timing["steps"], timing["pairs"], timing["tokens"]) == (4, 16, run.window.num_tokens)
    assert set(timing["seconds"]) == {"training", "evaluation", "reference"}
    page = (tmp_path / "run" / REPORT).read_text()
    for text in ("DPO finished after 4 optimizer steps", 'id="samples"', "lowest margins, of eval at step 4", "<svg"):
        assert text in page


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("no <b>such</b> row hf_CANARYCANARY"), "failed after 2 optimizer steps"),
        (KeyboardInterrupt(), "was interrupted after 2 optimizer steps"),
    ],
    ids=["failed", "ctrl-c"],
)
def test_a_run_that_is_cut_short_leaves_one_too(
    tmp_path: Path, reported: None, error: BaseException, sentence: str
) -> None:
    run = trainer(tmp_path, callbacks=[Ending(error)], hub_token="hf_SECRETSECRET")
    with pytest.raises(type(error)):
        run.train()
    page = (tmp_path / REPORT).read_text()
    assert sentence in page
    assert "of the last step" in page
    assert "<b>such" not in page
    files = page + read(tmp_path / "run.json")
    assert not [secret for secret in ("CANARY", "SECRETSECRET") if secret in files]


def read(path: Path) -> str:
    return path.read_text()


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, reported: None, monkeypatch, caplog) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("prefopt.report.run.run_page", broken)
    trainer(tmp_path, max_steps=1).train()
    assert f"{REPORT} was not made" in caplog.text
    assert json.loads(read(tmp_path / "run.json"))["status"] == "finished"


def test_the_switch_leaves_the_files_out(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).train()
    assert not {"curves.png", PAIRS, REPORT} & {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "run.json").is_file()


# -- pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["set", "stream"])
def test_the_worst_and_best_pairs_are_those_of_the_predictions(tmp_path: Path, reported: None, stream: bool) -> None:
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    held_out = dataset(30, seed=3)
    rows: Any = held_out.to_iterable_dataset() if stream else held_out
    run = trainer(tmp_path, max_steps=3, eval_dataset=rows, eval_strategy="steps", eval_steps=3, compute_metrics=keep)
    run.train()
    predicted = seen[-1].predictions
    margins = predicted.rewards_chosen - predicted.rewards_rejected
    found = read_rows(tmp_path / PAIRS)
    order = np.argsort(margins)
    assert [pair["row"] for pair in found if pair["end"] == "worst"] == order[:NUM_KEPT].tolist()
    assert [pair["row"] for pair in found if pair["end"] == "best"] == order[::-1][:NUM_KEPT].tolist()
    for pair in found:
        row = pair["row"]
        assert pair["margin"] == pytest.approx(margins[row], abs=ROUNDING)
        assert pair["logps_rejected"] == pytest.approx(predicted.logps_rejected[row], rel=ROUNDING)
        assert pair["chosen"].strip() == held_out["chosen"][row].strip()
        assert pair["prompt"].strip() == held_out["prompt"][row].strip()
        assert pair["step"] == 3


def test_of_several_sets_each_has_its_pairs(tmp_path: Path, reported: None) -> None:
    sets = {"one": dataset(6, seed=3), "two": dataset(9, seed=4)}
    run = trainer(tmp_path, max_steps=2, eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    run.train()
    found = read_rows(tmp_path / PAIRS)
    assert [pair["set"] for pair in found] == ["eval_one"] * 6 + ["eval_two"] * 9
    assert len({pair["row"] for pair in found if pair["set"] == "eval_two"}) == 9
    run.evaluate(sets["one"], metric_key_prefix="test")
    assert {pair["set"] for pair in read_rows(tmp_path / PAIRS)} == {"eval_one", "eval_two", "test"}


def test_without_an_evaluation_they_are_those_of_the_last_step(tmp_path: Path, reported: None) -> None:
    trainer(tmp_path, max_steps=3, per_device_train_batch_size=3, gradient_accumulation_steps=2).train()
    found = read_rows(tmp_path / PAIRS)
    assert {pair["set"] for pair in found} == {"train"}
    last = [row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row][-1]
    assert len({pair["row"] for pair in found}) == 6
    assert np.mean([pair["margin"] for pair in found]) == pytest.approx(last["rewards/margins"], abs=ROUNDING)
    assert np.mean([pair["logps_chosen"] for pair in found]) == pytest.approx(last["logps/chosen"], rel=ROUNDING)


def test_extremes_are_those_of_all_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "NUM_PENDING", 3)
    values = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    values[17, 0], values[30, 1] = math.nan, math.inf
    extremes = Extremes()
    for start, stop in ((0, 1), (1, 90), (90, 91), (91, 160), (160, 160), (160, 200)):
        extremes.add([ScoredPairs(values[start:stop], [{"row": row} for row in range(start, stop)])])
    margins = {row: float(values[row, 0] - values[row, 1]) for row in range(200) if row not in (17, 30)}
    order = sorted(margins, key=margins.__getitem__)
    assert [scored.row["row"] for scored in extremes.settle()] == order[:NUM_KEPT] + order[-NUM_KEPT:]


def test_images_are_not_held_until_the_numbers_are_there() -> None:
    row = {"row": 3, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [4], "images": [object()], "prompt": "text"}
    of_pair = {branch: torch.zeros(1) for branch in ("chosen", "rejected")}
    batch: Any = SimpleNamespace(num_model_tokens=4)
    held = ScoredPairs.made(of_pair, of_pair, batch, [row]).rows
    assert held == [{"row": 3, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [4]}]


@pytest.mark.parametrize(("num", "worst", "best"), [(1, 1, 0), (4, 2, 2), (7, 4, 3), (30, 5, 5)])
def test_no_pair_is_at_both_ends(tmp_path: Path, num: int, worst: int, best: int) -> None:
    write_pairs(tmp_path, 3, {"eval": [{"row": row, "margin": float(-row)} for row in range(num)]})
    found = read_rows(tmp_path / PAIRS)
    assert [pair["end"] for pair in found] == ["worst"] * worst + ["best"] * best
    assert [pair["row"] for pair in found if pair["end"] == "worst"] == list(range(num))[::-1][:worst]
    assert [pair["row"] for pair in found if pair["end"] == "best"] == list(range(num))[:best]


def test_a_resumed_run_drops_what_came_later_and_a_new_one_all(tmp_path: Path, reported: None) -> None:
    options: dict[str, Any] = {"eval_dataset": dataset(6, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, max_steps=4, **options, **saving).train()
    assert {pair["step"] for pair in read_rows(tmp_path / PAIRS)} == {4}
    resumed = trainer(tmp_path, max_steps=4, callbacks=[Seeing(tmp_path)], **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = next(c for c in resumed.callback_handler.callbacks if isinstance(c, Seeing)).pairs
    assert seen == []
    record = json.loads(read(tmp_path / "run.json"))
    assert (record["steps"], record["timing"]["steps"], record["timing"]["pairs"]) == (4, 1, 4)


def test_a_resumed_run_that_fails_before_its_first_step_says_why(tmp_path: Path, reported: None) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **saving).train()
    with pytest.raises(RuntimeError, match="at once"):
        trainer(tmp_path, callbacks=[AtOnce()], **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    record = json.loads(read(tmp_path / "run.json"))
    assert (record["status"], record["steps"], record["timing"]["steps"]) == ("failed", 2, 0)
    assert "at once" in read(tmp_path / REPORT)


class AtOnce(TrainerCallback):
    """Fails when the first epoch begins."""

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("at once")


def test_a_device_that_failed_does_not_hide_why_the_run_did(
    tmp_path: Path, reported: None, monkeypatch, caplog
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(ScoredPairs, "of_step", broken)
    with pytest.raises(KeyError, match="the reason"):
        trainer(tmp_path, callbacks=[Ending(KeyError("the reason"))]).train()
    assert f"{PAIRS} was not made" in caplog.text


class Seeing(TrainerCallback):
    """What the file of pairs has when the first step begins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pairs = folder, None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.pairs is None:
            self.pairs = read_rows(self.folder / PAIRS)


# -- time --------------------------------------------------------------------------------------------------------------


def test_every_second_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("prefopt.trainer.ending.describing.time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock.part("training"), clock.part("evaluation"), clock.part("reference"):  # from 0, 1, 3
        pass  # to 15, 10, 6
    assert clock.seconds == {"reference": 3.0, "evaluation": 6.0, "training": 6.0}


# -- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at the end", "with a checkpoint"])
def test_no_text_of_the_data_is_pushed(tmp_path: Path, reported: None, when: str, monkeypatch) -> None:
    sent: list[dict[str, Any]] = []

    class Hub:
        def upload_folder(self, **options: Any) -> Any:
            sent.append(options)

    monkeypatch.setattr(pushing, "HfApi", Hub)
    options: dict[str, Any] = {"eval_dataset": dataset(6, seed=3), "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, max_steps=1, generate_during_eval=True, save_strategy="steps", save_steps=1, **options)
    run.train()
    run.save_model()
    words = dataset(6, seed=3)["chosen"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.out.tfevents.1").write_text(words[0])  # as TensorBoard's callback writes samples
    for trial in ("run-0", "trials/run-1"):  # of a search
        for name in (PAIRS, "samples.jsonl", "run.json", REPORT, "_nonfinite-step-2/rows.json", "checkpoint-5/rows"):
            (tmp_path / trial / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / trial / name).write_text(words[0])
    run.hub_model_id, run.push_in_progress = "someone/model", None
    run.push_to_hub() if when == "at the end" else run._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert sent[0]["folder_path"] == str(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    pushed = set(filter_repo_objects(files, ignore_patterns=sent[0]["ignore_patterns"]))
    assert {REPORT, PAIRS, "samples.jsonl", "run.json"} <= set(files)
    assert {"model.safetensors", "README.md", "metrics.jsonl", "curves.png"} <= pushed
    shown = [name for name in pushed for word in words if word.strip().encode() in (tmp_path / name).read_bytes()]
    assert shown == []
