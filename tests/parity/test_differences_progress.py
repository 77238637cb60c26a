"""Where a run of prefopt shows something else than a run of TRL 1.16. Lines of docs/differences.md."""

from __future__ import annotations

import pytest
from parity_harness import build

pytestmark = pytest.mark.trl


def shown(library: str, capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """Standard output and error of three steps, where there is no terminal."""
    trainer = build(library, "cpo", {"disable_tqdm": False})  # type: ignore[arg-type]
    trainer.train()
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    """TRL draws a bar into whatever standard error is, and prints each row as a mapping."""
    out, err = shown("trl", capsys)
    assert out.count("{'loss': ") == 3
    assert "\r" in err
    assert "3/3" in err
    out, err = shown("prefopt", capsys)
    assert "\r" not in out + err
    assert [line[:8] for line in out.splitlines() if line.startswith("step")] == ["step 1/3", "step 2/3", "step 3/3"]
    assert out.splitlines()[-1].startswith("training: 3 steps in ")
