"""The trial of a kernel finds every fault that a kernel could have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_kernels import CUDA, stand_in
from torch import Tensor

from prefopt.scoring.attention import varlen
from prefopt.scoring.attention.options import LayerOptions
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.attention.trial import fault_of

FAULTS: dict[str, tuple[dict[str, Any], Callable[[LayerOptions, Plan], tuple[LayerOptions, Plan]]]] = {
    "a window too wide": ({"windowed": True}, lambda o, p: (replace(o, window=o.window + 1), p)),
    "no window": ({"windowed": True}, lambda o, p: (replace(o, window=None), p)),
    "no soft cap": ({"softcap": 5.0}, lambda o, p: (replace(o, softcap=None), p)),
    "another scale": ({}, lambda o, p: (replace(o, scale=0.2), p)),
    "a prefix too short": (
        {},
        lambda o, p: (o, Plan(tuple((s, e, a, b - (b > a)) for s, e, a, b in p.segments), p.device)),
    ),
    "no prefix": ({}, lambda o, p: (o, Plan(tuple((s, e, s, s) for s, e, _, _ in p.segments), p.device))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_finds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, wrong = FAULTS[fault]
    case = replace(CUDA, device=torch.device("cpu"), head_dim=8, value_dim=8, **changes)
    attend = stand_in(monkeypatch, "flash")
    assert fault_of(attend, case) is None

    def faulty(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
        options, plan = wrong(options, plan)
        return attend(query, key, value, plan, options)

    assert "its output is wrong" in str(fault_of(faulty, case))


def test_the_trial_finds_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = stand_in(monkeypatch, "flash")
    case = replace(CUDA, device=torch.device("cpu"), head_dim=8, value_dim=8)

    def detached(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
        frozen = torch.cat([key[:, :, :60].detach(), key[:, :, 60:]], dim=2)
        return attend(query, frozen, value, plan, options)

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert fault_of(attend, case) is None
        assert "gradient of the keys is wrong" in str(fault_of(detached, case))


def test_an_error_in_the_trial_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_kernel", lambda: 1 / 0)
    assert "ZeroDivisionError" in str(fault_of(varlen.attend_varlen, replace(CUDA, device=torch.device("cpu"))))
