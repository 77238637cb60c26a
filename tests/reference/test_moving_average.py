"""TR-DPO's soft update and BEMA against values worked out by hand, and on models."""

from __future__ import annotations

import pytest
import torch
from reference_models import adapted, batch_of, log_probs, lora, policy_stats, shake, tiny_llama
from torch.testing import assert_close

from prefopt.reference import BEMASchedule, BEMAState, make_reference, named_weights, soft_update


def weights(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=dtype)}


def test_soft_update_by_hand() -> None:
    """0.6 * 5 + 0.4 * 1 = 3.4; 0.6 * -1 + 0.4 * 2 = 0.2."""
    reference = weights(1.0, 2.0)
    soft_update(reference, weights(5.0, -1.0), 0.6)
    assert_close(reference["w"], torch.tensor([3.4, 0.2]))


def test_ends_of_the_range_are_exact() -> None:
    reference = weights(0.1, 0.7)
    soft_update(reference, weights(0.3, -0.9), 0.0)
    assert torch.equal(reference["w"], torch.tensor([0.1, 0.7]))
    soft_update(reference, weights(0.3, -0.9), 1.0)
    assert torch.equal(reference["w"], torch.tensor([0.3, -0.9]))


def test_equal_weights_stay_equal() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000)
    reference = {"w": values.clone()}
    soft_update(reference, {"w": values}, 0.37)
    assert torch.equal(reference["w"], values)


def test_bfloat16_is_rounded_once() -> None:
    """In bfloat16 throughout, (1 - a) old and a new would each be rounded before they are added."""
    torch.manual_seed(0)
    old, new = torch.randn(500).bfloat16(), torch.randn(500).bfloat16()
    reference = {"w": old.clone()}
    soft_update(reference, {"w": new}, 0.25)
    assert reference["w"].dtype == torch.bfloat16
    assert torch.equal(reference["w"], (0.75 * old.double() + 0.25 * new.double()).float().bfloat16())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        soft_update(weights(1.0), weights(2.0), alpha)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'w' of shape \(2,\), the policy one of shape \(1,\)"):
        soft_update(weights(1.0, 2.0), weights(2.0), 0.5)
    with pytest.raises(ValueError, match="none of that name"):
        soft_update({"v": torch.ones(1)}, weights(2.0), 0.5)


@pytest.mark.parametrize("kind", ["full", "full bfloat16", "new LoRA", "trained LoRA"])
def test_alpha_one_makes_the_reference_the_policy(kind: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    model = tiny_llama(dtype=dtype) if "full" in kind else adapted(lora(), trained="trained" in kind)
    reference, batch = make_reference(model, updates=True), batch_of()
    start = log_probs(reference(batch))
    shake(model)
    soft_update(reference.weights(), named_weights(model), 1.0)
    assert_close(log_probs(reference(batch)), log_probs(policy_stats(model, batch)), rtol=1e-6, atol=1e-6)
    assert (log_probs(reference(batch)) - start).abs().max() > 0.01


def test_a_full_update_is_that_of_every_parameter() -> None:
    model = tiny_llama()
    reference = make_reference(model, updates=True)
    before = {name: tensor.clone() for name, tensor in reference.weights().items()}
    shake(model)
    policy = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    soft_update(reference.weights(), named_weights(model), 0.6)
    assert before.keys() == policy.keys()
    for name, tensor in reference.weights().items():
        assert_close(tensor, 0.6 * policy[name] + 0.4 * before[name])
        assert torch.equal(model.get_parameter(name), policy[name])


def test_only_the_adapter_is_averaged_under_peft() -> None:
    model = adapted(lora(), trained=True)
    reference = make_reference(model, updates=True)
    trainable = {name for name, parameter in named_weights(model).items() if parameter.requires_grad}
    assert reference.weights().keys() == trainable


def test_averaged_factors_are_not_the_average_of_products() -> None:
    """(a b + (1-a) b')(a a + (1-a) a') has cross terms: with b = a = 1 and b' = a' = 3 at a half it is 4, not 5."""
    factors = {"A": torch.tensor(3.0), "B": torch.tensor(3.0)}
    soft_update(factors, {"A": torch.tensor(1.0), "B": torch.tensor(1.0)}, 0.5)
    assert float(factors["A"] * factors["B"]) == 4.0


def test_schedule_by_hand() -> None:
    """(10 + 1 * 390)^-0.5 = 400^-0.5 = 0.05; (0 + 2 * 16)^-0.2 = 32^-0.2 = 0.5."""
    assert BEMASchedule().beta(390) == pytest.approx(0.05)
    assert BEMASchedule(lag=0, multiplier=2.0).alpha(16) == pytest.approx(0.5)
    assert BEMASchedule(min_ema_multiplier=0.3).beta(390) == 0.3
    assert BEMASchedule(ema_power=0.0, bias_power=0.0).beta(7) == 1.0
    assert BEMASchedule(bias_power=0.0).alpha(7) == 1.0


def test_bema_by_hand() -> None:
    """theta_0 = 1; theta = 3, beta = 0.5: E = 2, theta' = 2 + 0.25 * 2 = 2.5.

    theta = 5, beta = 0.25: E = 2 * 0.75 + 5 * 0.25 = 2.75, theta' = 2.75 + 0.5 * 4 = 4.75.
    """
    state = BEMAState(weights(1.0))
    assert state.average["w"].item() == 1.0
    state.update(weights(3.0), beta=0.5, alpha=0.25)
    assert (state.ema["w"].item(), state.average["w"].item()) == (2.0, 2.5)
    state.update(weights(5.0), beta=0.25, alpha=0.5)
    assert (state.ema["w"].item(), state.average["w"].item()) == (2.75, 4.75)


def test_restart_leaves_the_average() -> None:
    state = BEMAState(weights(1.0))
    state.update(weights(3.0), beta=1.0, alpha=0.0)
    state.restart(weights(7.0))
    assert (state.start["w"].item(), state.ema["w"].item(), state.average["w"].item()) == (7.0, 7.0, 3.0)


def test_bema_does_not_hold_the_weights_it_is_given() -> None:
    given = weights(1.0)
    state = BEMAState(given)
    given["w"].fill_(9.0)
    assert (state.start["w"].item(), state.ema["w"].item(), state.average["w"].item()) == (1.0, 1.0, 1.0)


def test_bema_of_bfloat16_weights_is_float32() -> None:
    state = BEMAState(weights(1.0, dtype=torch.bfloat16))
    state.update(weights(1.0078125, dtype=torch.bfloat16), beta=0.5, alpha=0.0)
    assert state.average["w"].item() == 1.00390625  # between two bfloat16 numbers


def test_bema_state_survives_a_checkpoint() -> None:
    state = BEMAState(weights(1.0))
    state.update(weights(3.0), beta=0.5, alpha=0.25)
    later = BEMAState(weights(100.0))
    later.load_state_dict({name: tensor.clone() for name, tensor in state.state_dict().items()})
    for one in (state, later):
        one.update(weights(5.0), beta=0.25, alpha=0.5)
    assert later.average["w"].item() == state.average["w"].item() == 4.75
    with pytest.raises(ValueError, match="does not fit"):
        later.load_state_dict({"start.v": torch.ones(1)})
