"""What all tests share: no network, one thread, no writes outside temporary folders, and the shared real data."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="prefopt-trackio-")  # read when trackio is imported
os.environ["PREFOPT_REPORT"] = "off"  # a second a run; the tests of curves and reports turn it on

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, models and tokenizers, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no folder 'shared' beside the checkout: its real data, model and tokenizer are not here")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models are faster on one thread, and sums are then taken in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def heeds_ctrl_c() -> None:
    """A shell has what it starts in the background ignore SIGINT, which a run then ignores too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def swept_at_the_end() -> Iterator[None]:
    """What `imports_set_aside` set aside is let go of like anything else."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def imports_set_aside() -> None:
    """Every run begins with accelerate's search for garbage; among a million objects of imports it takes half a second.

    What is set aside is taken to be alive: at the start of a module, after a search.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of this run, so that no test sees what an earlier run computed."""
    os.environ["PREFOPT_CACHE"] = "off"
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets_cache"))


@pytest.fixture
def reference_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets the runs of a test share what their references gave; without it each run computes it for itself."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "reference_cache"))
    return tmp_path / "reference_cache"
