"""Settings of the tests that compare with TRL: no network, no telemetry, no progress bars."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quiet_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL sends telemetry unless it runs under CI, and warns on every import from its experimental part."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer in a folder: both libraries load policy and reference from it."""
    from parity_harness import POLICY
    from tiny_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("policy"), **POLICY)
