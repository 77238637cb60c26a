"""Loss and gradient of every family that may share prompts: shared == packed == padded == the plain forward."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    LAYOUTS,
    checkpointed,
    groups,
    layout_loss,
    loss_and_gradient,
    objective,
    plain_loss,
    reference_of,
    tiny,
)
from torch import nn

from prefopt.objective import Objective
from prefopt.scoring.capability import choose_layout
from prefopt.types import TRIPLE

LOSS_TOLERANCE = 1e-6
"""Relative, float32: eight roundings. The worst that was measured, over all families and six seeds, is 5e-7."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm over all trained weights, float32; the worst that was measured is 1e-6."""

METHODS = ("dpo", "tpo")
CHECKPOINTING = {"plain": None, "reentrant": True, "non-reentrant": False}
WINDOWED = [family for family, options in FAMILIES.items() if "sliding_window" in options]


def assert_same_step(model: nn.Module, seed: int, wanted: Objective, enable: bool | None) -> None:
    """Every layout, with checkpointing or without, against the plain forward without."""
    reference, pairs = reference_of(model), groups(seed)
    model.train()  # gemma3n computes otherwise in evaluation mode
    loss, gradient = loss_and_gradient(plain_loss, model, reference, LAYOUTS["padded"](pairs, wanted.branches), wanted)
    assert gradient.norm() > 0
    if enable is not None:
        checkpointed(model, enable)
    for layout, make_batch in LAYOUTS.items():
        ours = loss_and_gradient(layout_loss, model, reference, make_batch(pairs, wanted.branches), wanted)
        assert ours[0].item() == pytest.approx(loss.item(), rel=LOSS_TOLERANCE), layout
        assert ((ours[1] - gradient).norm() / gradient.norm()).item() < GRADIENT_TOLERANCE, layout


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_the_plain_forward(family: str, checkpointing: str) -> None:
    for seed, method in enumerate(METHODS):
        assert_same_step(tiny(family), seed, objective(method), CHECKPOINTING[checkpointing])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_the_plain_forward_with_an_adapter(family: str) -> None:
    """LoRA on all linear layers, both factors random; the reference is the model without it."""
    for seed, (method, enable) in enumerate([("dpo", True), ("dpo", False), ("tpo", None)]):
        assert_same_step(adapted(tiny(family)), seed, objective(method), enable)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():  # peft speaks of layers that some families lack or store transposed
        warnings.simplefilter("ignore")
        adapter = get_peft_model(model, config)
    adapter.enable_input_require_grads()  # as the trainer does, for reentrant checkpointing
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_able_to_share(family: str) -> None:
    choice = choose_layout(tiny(family), "auto", groups(1)[3], TRIPLE)
    assert str(choice) == "batch layout: shared_prompt"


@pytest.mark.parametrize("family", WINDOWED)
def test_the_windows_of_these_tests_bite(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a layout that loses the window would pass."""
    wanted = objective("tpo")
    batch = LAYOUTS["padded"](groups(1), wanted.branches)

    def loss() -> float:
        model = tiny(family)
        return plain_loss(model, reference_of(model), batch, wanted).item()

    with_window = loss()
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], "sliding_window": 128})
    assert abs(loss() - with_window) > 1e3 * LOSS_TOLERANCE


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_in_these_tests_recomputes(use_reentrant: bool) -> None:
    model, wanted, calls = tiny("llama"), objective("tpo"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed(model, use_reentrant)
    batch = LAYOUTS["shared_prompt"](groups(1), wanted.branches)
    loss_and_gradient(layout_loss, model, reference_of(model), batch, wanted)
    assert len(calls) == 2
