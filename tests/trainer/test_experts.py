"""Mixtures of experts: their balancing loss in every layout and trainer, and adapters on their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from families import EXPERTS, LAYOUTS, LOCAL_EXPERTS, checkpointed, groups, tiny
from oracle import PLAIN_RUN, SAME_LOSS, expected_losses, logged_losses
from short_runs import TRAINERS, dataset, trainer

from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import balancing_loss, score
from prefopt.types import TRIPLE

VALUE = 2e-6
"""Relative, float32: means over tokens in another order."""
GRADIENT = 1e-5
"""Relative norm over all weights that the routers' logits depend on, float32."""
SHARED = {
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "mixtral": LOCAL_EXPERTS,
    "olmoe": EXPERTS,
    "gpt_oss": {**LOCAL_EXPERTS, **families.LAYERS},
    "granitemoe": LOCAL_EXPERTS,
    "flex_olmo": EXPERTS,
    "minimax_m2": LOCAL_EXPERTS,
    "granitemoeshared": {**LOCAL_EXPERTS, "shared_intermediate_size": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    "jetmoe": {**LOCAL_EXPERTS, "kv_channels": 8},
}
"""Families with a balancing loss that share prompts."""
PADDED = {
    **{family: families.UNSHARED[family] for family in ("qwen3_next", "jamba", "minimax", "phimoe")},
    "doge": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
}
"""Families with one that are computed padded."""


@pytest.fixture
def mixture(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model of the family, without windows that its layers do not name."""
    return made(request.param, monkeypatch)


def made(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(families.FAMILIES, family, {**SHARED, **PADDED}[family])
    return tiny(family)


def value_and_gradient(model: Any, aux_loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(aux_loss, weights, allow_unused=True)
    flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return aux_loss.item(), torch.cat([g.flatten().double() for g in flat])


def of_the_model(model: Any) -> tuple[float, torch.Tensor]:
    """As the model's own forward computes it of padded rows."""
    batch = LAYOUTS["padded"](groups(3), TRIPLE)
    outputs = model(**batch.model_inputs, use_cache=False, output_router_logits=True)
    return value_and_gradient(model, outputs.aux_loss)


def of_a_layout(model: Any, layout: str) -> tuple[float, torch.Tensor]:
    with segment_attention(model):
        scores = score(model, LAYOUTS[layout](groups(3), TRIPLE), with_aux_loss=True)
        assert scores.aux_loss is not None
        return value_and_gradient(model, scores.aux_loss)


def assert_same(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=VALUE)
    assert expected[1].norm() > 0
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < GRADIENT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixture", SHARED, indirect=True)
def test_every_layout_gives_the_padded_value(mixture: Any, layout: str) -> None:
    """A prompt that is computed once counts once for each of its completions."""
    assert_same(of_a_layout(mixture, layout), of_the_model(mixture))


@pytest.mark.parametrize("mixture", PADDED, indirect=True)
def test_models_that_do_not_share(mixture: Any) -> None:
    assert balancing_loss(mixture) is not None
    assert_same(of_a_layout(mixture, "padded"), of_the_model(mixture))


def test_a_prompt_that_counts_once_would_show() -> None:
    """Guards the tests above: without the weights the shared layout has another value."""
    model = tiny("qwen3_moe")
    batch = LAYOUTS["shared_prompt"](groups(3), TRIPLE)
    with segment_attention(model):
        router_logits = model.model(**batch.model_inputs, use_cache=False, output_router_logits=True).router_logits
    unweighted = balancing_loss(model)(router_logits, 4, 2)  # type: ignore[misc]
    assert abs(unweighted.item() - of_the_model(model)[0]) > 1e2 * VALUE * unweighted.item()


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
def test_recomputed_layers_keep_its_gradient(layout: str) -> None:
    model = tiny("qwen3_moe")
    expected = of_the_model(model.train())
    checkpointed(model, use_reentrant=False)
    assert_same(of_a_layout(model, layout), expected)


def test_reentrant_checkpointing_would_lose_its_gradient(tmp_path: Path) -> None:
    """Which is why it is refused; without the loss it is taken."""
    model = tiny("qwen3_moe")
    checkpointed(model, use_reentrant=True)
    with segment_attention(model):
        aux_loss = score(model, LAYOUTS["padded"](groups(3), TRIPLE), with_aux_loss=True).aux_loss
    assert aux_loss is not None
    assert not aux_loss.requires_grad
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="it would have no gradient"):
        trainer(tmp_path, model=tiny("qwen3_moe"), **options)
    run = trainer(tmp_path, model=tiny("qwen3_moe"), router_aux_loss_coef=0.0, **options, **PLAIN_RUN)
    run.train()
    assert len(logged_losses(run)) == 2


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_in_front(kind: str, tmp_path: Path) -> None:
    """A prompt's are routed, a prefix's are not."""
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    run = trainer(tmp_path, model=tiny("qwen3_moe"), peft_config=config, router_aux_loss_coef=0.3, **PLAIN_RUN)
    if kind == "PromptTuningConfig":
        expected = expected_losses(run)
        run.train()
        assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
    else:  # the model's own code takes the prefix's mask for tokens and fails
        run.train()
        assert run.state.log_history[0]["aux_loss"] > 1


# -- in the trainers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0], ids=["own", "given", "off"])
@pytest.mark.parametrize("method", TRAINERS)
def test_its_weight(method: str, coefficient: float | None, tmp_path: Path) -> None:
    """The option, else the model's own; 0 leaves it out. It is logged without its weight, in evaluation too."""
    model = tiny("granitemoe")
    model.config.router_aux_loss_coef = 0.25
    options = {**PLAIN_RUN, "router_aux_loss_coef": coefficient, "eval_dataset": dataset(3, seed=4)}
    run = trainer(tmp_path, method, model=model, **options)
    assert run.aux_weight == (0.25 if coefficient is None else coefficient)
    assert run.aux_loss_enabled is (coefficient != 0.0)
    before = run.evaluate()
    expected = expected_losses(run)
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
    row = run.state.log_history[1]
    assert ("aux_loss" in row) is ("eval_aux_loss" in before) is (coefficient != 0.0)
    if coefficient != 0.0:
        off = trainer(tmp_path, method, model=tiny("granitemoe"), **{**options, "router_aux_loss_coef": 0.0})
        without = off.evaluate()["eval_loss"]
        assert before["eval_loss"] == pytest.approx(without + run.aux_weight * before["eval_aux_loss"], rel=1e-5)


@pytest.mark.parametrize("mixture", ["jetmoe"], indirect=True)
def test_its_own_weight_under_another_name(mixture: Any, tmp_path: Path) -> None:
    assert mixture.config.aux_loss_coef == trainer(tmp_path, model=mixture).aux_weight > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_layout_trains_as_defined(
    family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(
        tmp_path, "tpo", model=made(family, monkeypatch), layout=layout, router_aux_loss_coef=0.3, **PLAIN_RUN
    )
    assert run.layout.layout == layout
    expected = expected_losses(run)
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
