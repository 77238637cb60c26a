"""Pairs with images: every layout gives the numbers of each sequence alone, and shared rows encode an image once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from families import LAYOUTS, checkpointed
from torch import Tensor
from vision_models import CALLED_WITH, FAMILIES, examples, oracle_logps, processor_of, tiny_vision, vision_of

from prefopt.batching import share_batch
from prefopt.batching.images import VisionInputs, vision_inputs
from prefopt.data.images import image_tensors
from prefopt.scoring import capability
from prefopt.scoring.attention import segment_attention, segment_mask
from prefopt.scoring.attention.backends import BACKENDS, obstacle
from prefopt.scoring.attention.options import case_of, layer_options
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.capability import choose_layout
from prefopt.scoring.comparison import scores_of_places, trial_groups
from prefopt.scoring.forward import score
from prefopt.scoring.plain import plain_scores
from prefopt.trainer.versions import stop_checkpointing
from prefopt.types import PAIR

LOGP_TOLERANCE = 1e-5
"""Nats, float32: two orders of summation of a log-sum-exp over 320 logits."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm, float32; the measured differences are about 1e-6."""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    made = processor_of(request.param)
    return request.param, made, tiny_vision(request.param, made)


def weighted(logps: Tensor) -> Tensor:
    return (logps * torch.linspace(-1, 1, len(logps))).sum()


def gradient(model: Any, logps: Tensor) -> Tensor:
    """[all weights] of a weighted sum of log-probs."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(weighted(logps), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layouts_agree_with_each_sequence_alone(case: Any, checkpointing: bool) -> None:
    family, made, model = case
    pairs, vision = examples(made, family), vision_of(model, made)
    model.eval()
    expected = oracle_logps(model, made, family, pairs)
    right = gradient(model, expected)
    if checkpointing:
        checkpointed(model, use_reentrant=False)
    for layout, make in LAYOUTS.items():
        with segment_attention(model):
            logps = score(model, make(pairs, PAIR, vision)).tokens.logps
            found = gradient(model, logps)
        assert (logps - expected).abs().max() < LOGP_TOLERANCE, layout
        assert (found - right).norm() / right.norm() < GRADIENT_TOLERANCE, layout
    stop_checkpointing(model)


def test_an_image_is_encoded_once_for_a_pair(case: Any) -> None:
    """The encoder runs once for a batch: on half the pixels of padded rows where the prompts have all images, and on
    each picture of either side once."""
    family, made, model = case
    vision = vision_of(model, made)
    seen: list[int] = []
    encoder = getattr(model.base_model, CALLED_WITH.get(family, "visual"))
    hook = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).numel()),
        with_kwargs=True,
    )
    with segment_attention(model), torch.no_grad():
        for numbers in ([0, 1, 2], [3]):
            for layout in ("shared_prompt", "padded"):
                score(model, LAYOUTS[layout](examples(made, family, numbers), PAIR, vision))
    hook.remove()
    of_prompts, twice, of_sides, once = seen
    assert 2 * of_prompts == twice
    assert of_sides == once


def test_rows_without_images_need_none(case: Any) -> None:
    """A micro-batch of text rows, of a model that could see."""
    family, made, model = case
    pairs, vision = examples(made, family, [1]), vision_of(model, made)
    with torch.no_grad(), segment_attention(model):
        expected = oracle_logps(model, made, family, pairs)
        for layout, make in LAYOUTS.items():
            batch = make(pairs, PAIR, vision)
            assert "pixel_values" not in batch.model_inputs
            assert (score(model, batch).tokens.logps - expected).abs().max() < LOGP_TOLERANCE, layout


def test_sides_that_keep_different_parts_of_a_prompt(case: Any) -> None:
    """Truncation at the start leaves out text before the images; these sequences stand apart, each with its images."""
    family, made, model = case
    vision, pairs = vision_of(model, made), examples(made, family, [0, 2])
    pairs[0] = replace(pairs[0], prompt_starts={"chosen": 1, "rejected": 4})
    with torch.no_grad(), segment_attention(model):
        padded, *others = (score(model, make(pairs, PAIR, vision)).tokens.logps for make in LAYOUTS.values())
    for logps in others:
        assert (logps - padded).abs().max() < LOGP_TOLERANCE


@pytest.mark.parametrize("planted", ["in the prompt", "between the sides"])
def test_images_in_another_order_are_other_numbers(case: Any, planted: str) -> None:
    """What the tests above would not notice if all pictures looked alike to the model."""
    family, made, model = case
    vision, [pair] = vision_of(model, made), examples(made, family, [4])
    images = dict(pair.images)
    if planted == "in the prompt":
        images["prompt"] = images["prompt"][::-1]
    else:
        images["chosen"], images["rejected"] = images["rejected"], images["chosen"]
    with torch.no_grad(), segment_attention(model):
        before = score(model, share_batch([pair], PAIR, vision)).tokens.logps
        after = score(model, share_batch([replace(pair, images=images)], PAIR, vision)).tokens.logps
    assert (before - after).abs().max() > 100 * LOGP_TOLERANCE


# -- the choice of a layout --------------------------------------------------------------------------------------------


def test_models_with_images_share_prompts(case: Any) -> None:
    family, made, model = case
    choice = choose_layout(model, "auto", examples(made, family, [4])[0], PAIR, vision_of(model, made))
    assert str(choice) == "batch layout: shared_prompt"


def test_the_trial_compares_with_the_models_own_logits(case: Any) -> None:
    family, made, model = case
    batch = LAYOUTS["padded"](examples(made, family), PAIR, vision_of(model, made))
    with torch.no_grad():
        few, all_places = scores_of_places(model, batch), plain_scores(model, batch)
    assert (few.tokens.logps - all_places.tokens.logps).abs().max() < LOGP_TOLERANCE


def test_the_trial_notices_images_in_another_order(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, made, model = case

    def faulty(pairs: Any, branches: Any, vision: Any) -> Any:
        backwards = [replace(p, images={part: own[::-1] for part, own in p.images.items()}) for p in pairs]
        return share_batch(backwards, branches, vision)

    monkeypatch.setitem(capability.LAYOUTS, "shared_prompt", faulty)
    choice = choose_layout(model, "auto", examples(made, family, [4])[0], PAIR, vision_of(model, made))
    assert choice.layout == "packed"
    assert "differs from the plain forward" in str(choice)


def test_a_trial_cuts_no_image(case: Any) -> None:
    """The places of every picture are in both groups, in number as the pictures make them."""
    family, made, model = case
    long = examples(made, family, [4])[0]
    long = replace(long, prompt_ids=[*range(5, 60), *long.prompt_ids])
    places = [token in made.image_token_ids for token in long.prompt_ids].count(True)
    for group in trial_groups(long):
        assert [token in made.image_token_ids for token in group.prompt_ids].count(True) == places > 0
        assert {part: len(own) for part, own in group.images.items()} == {"prompt": 2, "chosen": 1, "rejected": 1}
        share_batch([group], PAIR, vision_of(model, made))


# -- what workers do ---------------------------------------------------------------------------------------------------


def test_batches_are_made_without_the_model(case: Any) -> None:
    """What a worker process is sent has no weights, and makes the same batch."""
    family, made, model = case
    vision = vision_inputs(model, partial(image_tensors, made))
    sent = pickle.dumps(vision)
    assert len(sent) < 10**6
    pairs = examples(made, family)
    for make in LAYOUTS.values():
        ours, theirs = (make(pairs, PAIR, inputs).model_inputs for inputs in (vision, pickle.loads(sent)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mllama", "arguments": frozenset({"cross_attention_mask"})}, "layers of their own"),
        ({"model_type": "llava_onevision", "arguments": frozenset({"batch_num_images"})}, "where a text has several"),
        ({"model_type": "paligemma"}, "both directions"),
    ],
)
def test_models_that_read_images_otherwise_say_so(change: dict[str, Any], reason: str) -> None:
    vision = replace(VisionInputs(dict, "llava", 5, frozenset({"pixel_values"}), None), **change)
    assert vision.tensors([]) == {}
    with pytest.raises(ValueError, match=f"{change['model_type']}.*{reason}"):
        vision.tensors(["picture"])


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_blocks_see_themselves_in_both_directions(prefix: int, window: int | None) -> None:
    """Written out by the definition: what comes before, and the own block, within the window."""
    length, blocks = 9, ((prefix + 1, prefix + 4), (prefix + 6, prefix + 9))
    mask = segment_mask(length, prefix, window, torch.zeros(1), blocks)[0, 0] == 0
    for row in range(length):
        for key in range(prefix + length):
            query = prefix + row
            together = any(start <= query < end and start <= key < end for start, end in blocks)
            near = window is None or query - key < window
            assert mask[row, key] == (near and (key <= query or together)), (query, key)


def test_kernels_with_causal_masks_leave_blocks_alone() -> None:
    plan = Plan(((0, 8, 0, 0), (2, 5, -1, -1)), torch.device("cpu"))
    assert plan.segments == ((0, 8, 0, 0),)
    assert plan.blocks == ((2, 5),)
    tensors = [torch.zeros(1, 2, 8, 8)] * 3
    case = case_of(*tensors, layer_options({}, plan))
    assert all("both directions" in (obstacle(name, case) or "") for name in BACKENDS)
