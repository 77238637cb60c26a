"""Completions during evaluation: in TRL 1.16 an option of CPO, for two trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from parity_harness import REFERENCE, build, classes
from tiny_models import standard_rows, tiny_model

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_samples_of_every_method_without_a_tracker(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL: no such option in DPO and TPO; CPO asks for W&B or Comet, and tells neither before nor after training."""
    config = {"generate_during_eval": True, "eval_sample_tokens": 3}
    if method == "cpo":
        monkeypatch.setattr("trl.experimental.cpo.cpo_trainer.is_wandb_available", lambda: False)
        monkeypatch.setattr("trl.experimental.cpo.cpo_trainer.is_comet_available", lambda: False)
        with pytest.raises(ValueError, match="requires Weights and Biases or Comet"):
            build("trl", method, {"generate_during_eval": True})
    else:
        with pytest.raises(TypeError, match="generate_during_eval"):
            classes("trl", method)[0](str(tmp_path), generate_during_eval=True, bf16=False)
    arguments = {"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}
    rows = Dataset.from_dict(standard_rows(5, seed=5, gold=True))
    trainer = build("prefopt", method, {**config, "max_steps": 1}, eval_dataset=rows, **arguments)
    trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 4 + [1] * 4
    assert [line["prompt"] for line in lines] == rows["prompt"][:4] * 2
    assert all(("reference" in line) == (method == "dpo") for line in lines)
