"""Settings of the tests that compare with TRL: no network, no telemetry, no progress bars."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL sends telemetry unless it runs under CI, and warns on every import from its experimental part."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tiny models are faster on one thread, and both libraries then sum in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer in a folder: both libraries load policy and reference from it."""
    from parity_harness import POLICY
    from tiny_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("policy"), **POLICY)
