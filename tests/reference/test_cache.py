"""The cache finds what was scored by the same reference, and nothing else; a damaged file is never believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference_models import adapted, lora, one_weight, rows, shake, tiny_llama, two_adapters

from prefopt.reference import (
    fingerprint,
    make_reference,
    row_keys,
)
from prefopt.reference.precompute import row_key

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
