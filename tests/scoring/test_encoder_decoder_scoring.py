"""Encoder-decoder models: every completion gets the numbers that it has alone, and each prompt is encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoders import KINDS, tiny_encoder_decoder, token_examples, token_logps_alone
from families import checkpointed

from prefopt.batching import encoder_decoder_batch
from prefopt.scoring import encoder_decoder, forward
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.capability import choose_layout
from prefopt.scoring.forward import install, score, use_full_logits, uses_full_logits
from prefopt.scoring.plain import plain_scores, target_labels
from prefopt.scoring.transforms import LogitTransform
from prefopt.trainer.setup import disable_dropout
from prefopt.types import PAIR, TRIPLE, PreferenceBatch

LOGP_TOLERANCE = 1e-6
"""Relative to the largest log-prob, float32: sums of another order over 64 logits, which are up to 30 in T5."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm, float32; the measured differences are about 1e-6."""
STATISTICS = frozenset({"entropy", "mean_logit", "is_top1", "log_sum_sq_prob"})


def ready(kind: str, **changes: Any) -> Any:
    model = tiny_encoder_decoder(kind, **changes)
    install(model)
    return model


def recompute(model: Any, **options: bool) -> None:
    """Layers recompute, for which the model has to be in training mode; without dropout."""
    disable_dropout(model)
    checkpointed(model, **{"use_reentrant": False, **options})
    if options.get("use_reentrant"):
        model.enable_input_require_grads()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def differ(logps: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logps - expected).detach().abs().max() / expected.detach().abs().max())


def weighted(logps: torch.Tensor) -> torch.Tensor:
    return (logps * torch.linspace(-1, 1, len(logps))).sum()


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_has_the_numbers_that_it_has_alone(kind: str, checkpointing: str | None) -> None:
    model, examples = ready(kind), token_examples(3, TRIPLE)
    expected = torch.cat(token_logps_alone(model, examples, TRIPLE))
    weighted(expected).backward()
    expected_gradient = gradients(model)
    model.zero_grad()
    if checkpointing is not None:
        recompute(model, use_reentrant=checkpointing == "reentrant")
    batch = encoder_decoder_batch(examples, TRIPLE)
    with segment_attention(model):
        tokens = score(model, batch, STATISTICS).tokens
        weighted(tokens.logps).backward()
    assert differ(tokens.logps, expected) < LOGP_TOLERANCE
    difference = (gradients(model) - expected_gradient).norm() / expected_gradient.norm()
    assert difference < GRADIENT_TOLERANCE
    plain = plain_scores(model.eval(), batch, STATISTICS).tokens
    for name in STATISTICS:
        assert (getattr(tokens, name).double() - getattr(plain, name).double()).abs().max() < 1e-4, name


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_encoder_reads_each_prompt_once(kind: str) -> None:
    model, batch, rows = ready(kind), encoder_decoder_batch(token_examples(1, TRIPLE, 5), TRIPLE), []
    model.get_encoder().register_forward_hook(lambda *call: rows.append(len(call[-1].last_hidden_state)))
    weighted(score(model, batch).tokens.logps).backward()
    assert rows == [5]
    plain_scores(model, batch)
    assert rows == [5, 15]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "keys"), [("t5", "EncDecAttention.k"), ("bart", "encoder_attn.k_proj")])
def test_keys_and_values_are_made_of_each_prompt_once(kind: str, keys: str, checkpointing: bool) -> None:
    model, rows = ready(kind), []
    for name, module in model.named_modules():
        if name.endswith(keys):
            module.register_forward_hook(lambda module, args, output: rows.append((len(args[0]), len(output))))
    if checkpointing:
        recompute(model)
    weighted(score(model, encoder_decoder_batch(token_examples(1, TRIPLE, 5), TRIPLE)).tokens.logps).backward()
    layers = 2
    assert rows == [(5, 15)] * layers * (1 + checkpointing)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_one_weight_are_one_module(kind: str, tmp_path: Path) -> None:
    """As FSDP2 wants them; what is saved stays what it was."""
    plain, model = tiny_encoder_decoder(kind), ready(kind)
    bodies = (model.get_encoder(), model.get_decoder())
    tied = all(body.get_input_embeddings().weight is model.get_input_embeddings().weight for body in bodies)
    assert tied == (kind not in ("t5gemma", "bart untied"))
    assert (bodies[1].get_input_embeddings() is model.get_input_embeddings()) == tied
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_changes_nothing(kind: str) -> None:
    model, examples = ready(kind), token_examples(2, PAIR)
    logps = [
        score(model, encoder_decoder_batch(examples, PAIR, **options)).tokens.logps
        for options in ({}, {"pad_token_id": 7, "pad_to_multiple_of": 16})
    ]
    assert differ(*logps) < LOGP_TOLERANCE


def test_what_a_batch_holds() -> None:
    examples = token_examples(4, TRIPLE, 3)
    batch = encoder_decoder_batch(examples, TRIPLE, pad_to_multiple_of=8)
    assert {name: value.shape[0] for name, value in batch.model_inputs.items()} == {
        "input_ids": 3,
        "attention_mask": 3,
        "labels": 9,
    }
    assert all(value.shape[1] % 8 == 0 for value in batch.model_inputs.values())
    assert batch.model_inputs["attention_mask"].sum(1).tolist() == [len(example.prompt_ids) for example in examples]
    sizes = [len(e.prompt_ids) + len(e.completion_ids[branch]) for branch in TRIPLE for e in examples]
    assert batch.num_model_tokens == sum(sizes)
    assert batch.layout.lengths == tuple(sum(e.loss_masks[branch]) for branch in TRIPLE for e in examples)
    labels = target_labels(batch)
    assert torch.equal(labels[labels != -100], batch.targets)
    assert torch.equal(labels[labels != -100], batch.model_inputs["labels"][labels != -100])


def test_an_empty_prompt_has_something_to_attend_to() -> None:
    model, examples = ready("t5"), token_examples(5, PAIR, 2)
    object.__setattr__(examples[0], "prompt_ids", [])
    tokens = score(model, encoder_decoder_batch(examples, PAIR)).tokens
    assert tokens.logps.isfinite().all()
    object.__setattr__(examples[0], "prompt_ids", [0])
    assert (score(model, encoder_decoder_batch(examples, PAIR)).tokens.logps - tokens.logps).abs().max() == 0


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma"])
def test_the_layout_is_found_by_a_trial(kind: str) -> None:
    model, example = ready(kind), token_examples(1, PAIR)[0]
    choice = choose_layout(model, "auto", example, PAIR)
    assert str(choice) == "batch layout: encoder_decoder"
    assert not uses_full_logits(model)


@pytest.mark.parametrize("wanted", ["shared_prompt", "packed", "padded"])
def test_a_layout_for_one_body_is_not_taken_and_says_why(wanted: str) -> None:
    choice = choose_layout(ready("t5"), wanted, token_examples(1, PAIR)[0], PAIR)
    assert choice.layout == "encoder_decoder"
    assert "T5ForConditionalGeneration reads prompts in its encoder" in str(choice)


def test_a_scale_that_is_not_known_is_found_and_the_full_logits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = ready("t5"), token_examples(6, PAIR)
    monkeypatch.setattr(forward, "logit_transform", lambda config: LogitTransform())
    choice = choose_layout(model, "auto", examples[0], PAIR)
    assert "full logits" in str(choice)
    assert uses_full_logits(model)
    logps = score(model, encoder_decoder_batch(examples, PAIR)).tokens.logps
    assert differ(logps, torch.cat(token_logps_alone(model, examples, PAIR))) < LOGP_TOLERANCE


def test_prompts_given_to_the_wrong_completions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the encoder's rows in another order than the decoder's."""
    right = encoder_decoder.encoded

    def faulty(model: Any, labels: torch.Tensor, inputs: Any) -> dict[str, Any]:
        found = right(model, labels, inputs)
        found["encoder_outputs"].last_hidden_state = found["encoder_outputs"].last_hidden_state.flip(0)
        return found

    monkeypatch.setattr(forward, "encoded", faulty)
    assert "differs from the plain forward" in str(choose_layout(ready("t5"), "auto", token_examples(7, PAIR)[0], PAIR))


def test_full_logits_share_the_encoder_too() -> None:
    model, examples, rows = ready("bart"), token_examples(8, TRIPLE, 3), []
    use_full_logits(model)
    model.get_encoder().register_forward_hook(lambda *call: rows.append(len(call[-1].last_hidden_state)))
    batch: PreferenceBatch = encoder_decoder_batch(examples, TRIPLE)
    logps = score(model, batch).tokens.logps
    assert rows == [3]
    assert differ(logps, torch.cat(token_logps_alone(model, examples, TRIPLE))) < LOGP_TOLERANCE


def test_a_decoder_needs_something_to_begin_with() -> None:
    model = ready("t5", decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no `decoder_start_token_id`"):
        score(model, encoder_decoder_batch(token_examples(1, PAIR), PAIR))


def test_the_patched_model_generates_and_computes_losses_as_before() -> None:
    prompts, labels = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[8, 9, 2]])
    before, model = tiny_encoder_decoder("bart"), ready("bart")
    assert torch.equal(model(input_ids=prompts, labels=labels).loss, before(input_ids=prompts, labels=labels).loss)
    with segment_attention(model):
        assert torch.equal(model.generate(prompts, max_new_tokens=6), before.generate(prompts, max_new_tokens=6))
