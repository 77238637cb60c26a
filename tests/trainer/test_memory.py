"""What a step needs of memory: the arithmetic, and the counts it starts from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from live_storages import LiveStorages
from tiny_models import tiny_model
from torch import nn

from prefopt.scoring.attention import segment_attention
from prefopt.scoring.capability import CHAIN, LAYOUTS
from prefopt.scoring.forward import install, score
from prefopt.scoring.head.plan import uncached
from prefopt.trainer.memory import (
    ActivationModel,
    BatchSize,
    MemoryEstimate,
    container_bytes,
    largest_batch,
    training_bytes,
)
from prefopt.trainer.trials import kept_bytes, run_trials, trial_examples
from prefopt.types import PAIR, TokenizedExample

UNDER, OVER = 0.08, 0.2
"""How far below and above the estimate may be, from trials of 200 tokens to 1,220: masks are shared between pairs, and
attention that goes over long sequences in blocks holds less than the square of their length."""


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedExample:
    rng = random.Random(prompt)
    ids = {branch: tuple(rng.choices(range(5, 60), k=n)) for branch, n in zip(PAIR, (chosen, rejected), strict=True)}
    masks = {branch: (True,) * len(tokens) for branch, tokens in ids.items()}
    return TokenizedExample(0, tuple(rng.choices(range(5, 60), k=prompt)), ids, masks)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_three_counts_determine_the_curve() -> None:
    model = ActivationModel.fit([(t, 700 + 30 * t + 2 * t * t) for t in (10, 20, 40)])
    assert (model.fixed, model.per_token, model.per_square) == pytest.approx((700, 30, 2))
    # two pairs of 100 tokens: the fixed part once
    assert model.bytes(BatchSize(tokens=200, longest=100)) == pytest.approx(700 + 2 * (30 * 100 + 2 * 100**2))


def test_a_curve_that_bends_down_is_taken_as_straight() -> None:
    model = ActivationModel.fit([(10, 1000), (20, 1950), (40, 3800)])
    assert model.per_square == 0
    assert model.bytes(BatchSize(4000, 40)) == pytest.approx(380_000, rel=0.03)


def test_one_length_is_taken_as_all_per_token() -> None:
    assert ActivationModel.fit([(64, 640), (64, 640), (64, 700)]) == ActivationModel(0, 700 / 64, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_pairs": 2, "padded": False}, BatchSize(16, 9)),
        ({"num_pairs": 2, "padded": True}, BatchSize(18, 9)),
        ({"num_pairs": 9, "padded": False}, BatchSize(21, 9)),
        ({"num_pairs": 9, "padded": False, "budget": 12}, BatchSize(12, 9)),
        ({"num_pairs": 9, "padded": False, "budget": 5}, BatchSize(9, 9)),
        ({"num_pairs": 2, "padded": False, "budget": 100}, BatchSize(16, 9)),
    ],
)
def test_the_largest_micro_batch(options: dict, expected: BatchSize) -> None:
    assert largest_batch([3, 9, 2, 7], **options) == expected


def test_gradients_and_states_of_what_is_trained() -> None:
    trained, frozen = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(1000), requires_grad=False)
    assert training_bytes([trained, frozen], states=2, buckets=False) == 3 * 40
    assert training_bytes([trained, frozen], states=2, buckets=True) == 4 * 40
    trained.grad = torch.zeros(10)
    assert training_bytes([trained], states=0, buckets=False) == 0


def test_a_part_of_the_free_memory_is_left() -> None:
    assert MemoryEstimate(activations=50, training=20, free=100).fits
    assert not MemoryEstimate(activations=50, training=21, free=100).fits


def test_a_container_has_less_than_the_machine(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == float("inf")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_bytes(tmp_path) == 1000 - 700 + 150


# -- counting ----------------------------------------------------------------------------------------------------------


def test_trials_keep_the_proportions_of_a_pair() -> None:
    for example in (pair(700, 200, 100), pair(3, 40, 5), pair(0, 9, 9)):
        first, second, third = (
            [len(trial.prompt_ids), *(len(trial.completion_ids[branch]) for branch in PAIR)]
            for trial in trial_examples(example, PAIR)
        )
        assert second == [2 * n for n in first]
        assert third == [4 * n for n in first]
        assert sum(third) <= 200
        assert all(bool(n) == bool(m) for n, m in zip(first, (len(example.prompt_ids), 1, 1), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", CHAIN)
def test_what_is_kept_of_a_larger_batch(family: str, attention: str, layout: str) -> None:
    """Against the storages that are alive after the forward, whoever holds them."""
    model = tiny_model(family, num_hidden_layers=3, max_position_embeddings=1024, attn_implementation=attention)
    install(model)
    example = pair(150, 260, 200)
    trials = run_trials(model, example, PAIR, layout, precision=torch.enable_grad)
    assert trials.reaches_all

    batch = LAYOUTS[layout]([example, example], PAIR)
    inputs = [*batch.model_inputs.values(), batch.predict_from, batch.targets]
    live = LiveStorages([*model.parameters(), *model.buffers(), *inputs])
    with live, segment_attention(model), uncached():
        tokens = score(model, batch).tokens
        kept = live.bytes()
        assert tokens.logps.requires_grad
    size = batch.model_inputs["input_ids"].numel()
    estimate = ActivationModel.fit(trials.counts).bytes(BatchSize(size, size // 2))
    assert (1 - UNDER) * kept < estimate < (1 + OVER) * kept


def test_only_what_autograd_adds_is_counted() -> None:
    weight, inputs = torch.randn(8, 4, requires_grad=True), torch.randn(16, 8)
    known = [weight, inputs]
    assert kept_bytes(lambda: (inputs @ weight).sum(), known)[0] == 0
    # exp keeps its result, of which a view is kept again
    assert kept_bytes(lambda: (inputs @ weight).exp().T.square().sum(), known)[0] == 16 * 4 * 4


def test_a_weight_without_a_gradient_is_noticed() -> None:
    model = tiny_model()
    install(model)
    model.unused = nn.Parameter(torch.zeros(3))
    assert not run_trials(model, pair(9, 9, 9), PAIR, "padded", precision=torch.enable_grad).reaches_all
    model.unused.requires_grad_(False)
    assert run_trials(model, pair(9, 9, 9), PAIR, "padded", precision=torch.enable_grad).reaches_all


def test_trials_count_what_would_be_kept_without_checkpointing() -> None:
    model = tiny_model()
    install(model)
    plain = run_trials(model, pair(9, 9, 9), PAIR, "packed", precision=torch.enable_grad)
    start_checkpointing(model)
    assert run_trials(model, pair(9, 9, 9), PAIR, "packed", precision=torch.enable_grad) == plain


def start_checkpointing(model: Any) -> None:
    """By the name of this version of transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_trials_leave_no_trace() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    install(model)
    start_checkpointing(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run_trials(model, pair(9, 9, 9), PAIR, "padded", precision=torch.enable_grad)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
