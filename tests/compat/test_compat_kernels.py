"""Options about kernels and memory that TRL has: what happens with them where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
from parameters import pairs

from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, TPOConfig, TPOTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "tpo": (TPOTrainer, TPOConfig),
}
OPTIONS: dict[str, Any] = {"activation_offloading": True, "max_steps": 1, "report_to": "none", "use_cpu": True}


@pytest.mark.trl
def test_offloading_on_a_cpu_fails_in_trl(model: str, out: str) -> None:
    trl = pytest.importorskip("trl")
    with pytest.raises(AttributeError):
        trl.DPOTrainer(model, args=trl.DPOConfig(out, bf16=False, **OPTIONS), train_dataset=pairs()).train()


@pytest.mark.parametrize("method", TRAINERS)
def test_offloading_on_a_cpu(method: str, model: str, out: str) -> None:
    make, config = TRAINERS[method]
    options = OPTIONS | ({"tpo_alpha": 0.0} if method == "tpo" else {})
    with pytest.warns(UserWarning, match="activation_offloading=True has no effect on a CPU"):
        args = config(out, **options)
    trainer = make(model, args=args, train_dataset=pairs())
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.trl
def test_a_fused_loss_of_ligers_is_refused_by_trl_and_left_out_here(model: str, out: str, monkeypatch: Any) -> None:
    trl = pytest.importorskip("trl")
    liger = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    options = {name: value for name, value in OPTIONS.items() if name != "activation_offloading"}
    args = trl.DPOConfig(out, bf16=False, **options, **liger)
    with pytest.raises(ValueError, match="is not supported"):
        trl.DPOTrainer(model, args=args, train_dataset=pairs())
    with pytest.warns(UserWarning, match="has no effect: it is a loss for next tokens"):
        DPOTrainer(model, args=DPOConfig(out, **options, **liger), train_dataset=pairs())
