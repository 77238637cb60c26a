"""Adapters of every kind in the trainers: the reference, the layout, two steps by the definition."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft_kinds import (
    IN_EVERY_LAYOUT,
    IN_EVERY_TRAINER,
    KINDS,
    LAYOUTS,
    READ_BACK,
    UNMERGED,
    assert_trains_as_defined,
    log_probs,
    run_of,
)

from prefopt.scoring.forward import uses_full_logits


@pytest.mark.usefixtures("reference_cache")  # so that the reference has a fingerprint
@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, tmp_path: Path) -> None:
    """DPO: the reference is what the policy starts from, so the margin begins at 0; nothing needs the full logits.

    What was saved, put on the model it began from, gives the same log-probs; so do merged weights.
    """
    kind = KINDS[name]
    run = run_of(tmp_path, kind)
    assert run.layout.layout == kind.layout
    assert not uses_full_logits(run.model)
    assert type(run.model_reference) is kind.reference
    assert_trains_as_defined(run)
    assert run.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)

    run.save_model(str(tmp_path / "saved"))
    trained = log_probs(run.model)
    loaded = peft.PeftModel.from_pretrained(kind.made(), str(tmp_path / "saved"))
    assert (log_probs(loaded) - trained).abs().max() < READ_BACK * trained.abs().max()
    if name not in UNMERGED:
        assert (log_probs(loaded.merge_and_unload()) - trained).abs().max() < READ_BACK * trained.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_EVERY_LAYOUT)
def test_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, KINDS[name], layout=layout)
    assert run.layout.layout == layout
    assert_trains_as_defined(run)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
@pytest.mark.parametrize("name", IN_EVERY_TRAINER)
def test_every_trainer(name: str, method: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, KINDS[name], method)
    assert run.layout.layout == KINDS[name].layout
    assert_trains_as_defined(run)
