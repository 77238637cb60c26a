"""The model card: in TRL 1.16 a template, whatever the run was."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_harness import Library, build

pytestmark = pytest.mark.trl


def card(library: Library, model: str) -> str:
    trainer = build(library, "dpo", {"max_steps": 1, "beta": 0.3}, model=model)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def test_the_card_of_a_local_model(policy_path: str) -> None:
    """TRL: names it ``None`` and says nothing of options, data and results."""
    theirs, ours = card("trl", policy_path), card("prefopt", policy_path)
    assert "fine-tuned version of [None](https://huggingface.co/None)" in theirs
    assert "None" not in ours
    assert f"from `{Path(policy_path).name}` on preference data" in ours
    assert policy_path not in ours
    for said in (
        "| `beta` | `0.3` |",
        "| `train_loss` |",
        "| status | `finished` |",
        "| `unnamed rows` | `training` | 1",
    ):
        assert said in ours
    assert not [what for what in ("beta", "train_loss", "rows") if what in theirs.split("## Citations")[0]]
