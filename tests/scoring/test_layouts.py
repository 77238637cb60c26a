"""Every layout gives the numbers of the model's own forward: log-probs, statistics and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from families import LAYOUTS, checkpointed, tiny

from prefopt.batching import pack_batch, pad_batch, share_batch
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import score
from prefopt.scoring.plain import plain_scores
from prefopt.types import TRIPLE, TokenizedExample

LOGP_TOLERANCE = 1e-5
"""Nats, float32: two orders of summation of a log-sum-exp over 64 logits."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm, float32; the measured differences are about 1e-6."""

STATISTICS = frozenset({"entropy", "mean_logit", "is_top1", "log_sum_sq_prob"})
FAMILIES = (
    "llama",
    "qwen3",
    "gemma2",
    "mistral",
    "gpt_oss",
    "gemma3_text",
    "granite",
    "cohere2",
    "gpt2",
    "stablelm",
    "qwen3_moe",
)
"""With odd groups and every statistic; `test_families` has all families, with losses."""


def examples(seed: int, count: int = 4) -> list[TokenizedExample]:
    """Pairs of unequal lengths; one without a prompt, one with masked tokens, one with branches of other prompts."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 64) for _ in range(rng.randint(low, high))]

    made = []
    for row in range(count):
        completions = {"chosen": ids(1, 12), "rejected": ids(1, 20), "gold": ids(2, 9)}
        masks = {branch: [True] * len(tokens) for branch, tokens in completions.items()}
        prompt = [] if row == 0 else ids(3, 18)
        if row == 1:
            masks["rejected"] = [rng.random() < 0.6 for _ in completions["rejected"]]
        starts = {"chosen": 0, "rejected": 2, "gold": 1} if row == 2 else {}
        made.append(TokenizedExample(row, prompt, completions, masks, starts))
    return made


def scored(model: torch.nn.Module, layout: str, seed: int) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Log-probs, other statistics, and the gradient of a weighted sum of the log-probs."""
    batch = LAYOUTS[layout](examples(seed), TRIPLE)
    model.zero_grad()
    with segment_attention(model):
        tokens = score(model, batch, STATISTICS).tokens
        (tokens.logps * torch.linspace(-1, 1, len(tokens.logps))).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return tokens.logps.detach(), {name: getattr(tokens, name) for name in STATISTICS}, gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree(family: str, checkpointing: bool) -> None:
    model = tiny(family)
    seed = random.randrange(10**6)
    expected = plain_scores(model, pad_batch(examples(seed), TRIPLE), STATISTICS).tokens
    if checkpointing:
        checkpointed(model, use_reentrant=False)
    gradients = {}
    for layout in LAYOUTS:
        logps, statistics, gradients[layout] = scored(model, layout, seed)
        assert (logps - expected.logps).abs().max() < LOGP_TOLERANCE, (layout, seed)
        for name, value in statistics.items():
            difference = (value.double() - getattr(expected, name).double()).abs().max()
            assert difference < 1e-4, (layout, name, seed)
    for layout in ("packed", "shared_prompt"):
        difference = (gradients[layout] - gradients["padded"]).norm() / gradients["padded"].norm()
        assert difference < GRADIENT_TOLERANCE, (layout, seed)


def test_generation_is_untouched_by_segments() -> None:
    """The same model object, inside the context, generates and takes left-padded batches as before."""
    model = tiny("mistral")
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = (ids != 0).long()
    before = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with segment_attention(model):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
        again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again)


def test_the_segment_name_is_taken_back_and_never_saved(tmp_path) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with segment_attention(model), segment_attention(model):
        model.save_pretrained(tmp_path)
        assert model.config._attn_implementation.startswith("prefopt_")
    assert model.config._attn_implementation == before
    assert "prefopt" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_may_be_named_twice(implementation: str) -> None:
    """Policy and reference may be one model; nothing is registered over the registered function."""
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    with segment_attention(model, model):
        assert model.config._attn_implementation == f"prefopt_{implementation}"
    assert model.config._attn_implementation == implementation


def test_a_copy_of_an_installed_model_scores_with_its_own_weights() -> None:
    """A patched forward that stayed bound to the original would make every snapshot follow the policy."""
    from copy import deepcopy

    model = tiny("llama")
    copy = deepcopy(model)
    batch = pad_batch(examples(1), TRIPLE)
    before = score(copy, batch).tokens.logps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(score(copy, batch).tokens.logps, before)
    assert not torch.allclose(score(model, batch).tokens.logps, before)


def test_shared_prompt_computes_each_prompt_once() -> None:
    pairs = examples(3)[3:]
    shared, packed = share_batch(pairs, TRIPLE), pack_batch(pairs, TRIPLE)
    prompt = len(pairs[0].prompt_ids)
    assert packed.model_inputs["input_ids"].shape[1] - shared.model_inputs["input_ids"].shape[1] == 2 * prompt
    assert shared.num_model_tokens == packed.num_model_tokens  # the log counts the prompt once per completion


def test_the_segments_are_never_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read waits for the device. A batch knows its segments; a carrier alone is read once for all layers."""
    model = tiny("llama").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    batch = share_batch(examples(1), TRIPLE)
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    with segment_attention(model):
        score(model, batch).tokens.logps.sum().backward()
        assert not reads
        model(**share_batch(examples(1), TRIPLE).model_inputs).logits.sum().backward()
    assert len(reads) == 1
