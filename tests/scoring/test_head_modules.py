"""Heads as modules: which are taken as matrices, which are called as they are; both give the model's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from head_cases import STATISTICS
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn

from prefopt.batching import pad_batch
from prefopt.scoring.forward import install, score
from prefopt.scoring.head import call, token_stats
from prefopt.scoring.plain import plain_scores
from prefopt.scoring.tokens import stats_of_logits
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import PAIR, TokenizedExample, TokenStats

TRANSFORM = LogitTransform(0.5, 3.0)
SIZES = (6, 11)
NUM_TOKENS = 9
CLOSE = 1e-5
"""Numbers of up to 10 in float32, whose rounding is 1e-6, in sums of up to 64."""


@pytest.fixture
def as_matrices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a head is taken as matrices."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> TokenStats:
        calls.append(len(calls))
        return original(*args, **kwargs)

    original = call.factored_stats
    monkeypatch.setattr(call, "factored_stats", counted)
    return calls


def assert_right(head: nn.Module, *, expected_head: Callable[[Tensor], Tensor] | None = None) -> None:
    """Statistics and gradients are those of the logits that the head makes when it is called."""
    torch.manual_seed(1)
    hidden = torch.randn(NUM_TOKENS, getattr(head, "in_features", SIZES[0]), requires_grad=True)
    logits = TRANSFORM((expected_head or head)(hidden))
    targets = torch.randint(0, logits.shape[-1], (NUM_TOKENS,))
    targets[:2] = torch.tensor([0, logits.shape[-1] - 1])
    upstream = torch.randn(NUM_TOKENS)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]

    def gradients(stats: TokenStats) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad((stats.logps * upstream).sum(), leaves, allow_unused=True)

    expected = stats_of_logits(logits, targets, STATISTICS)
    found = token_stats(head, hidden, targets, TRANSFORM, STATISTICS)
    for name in ("logps", *STATISTICS):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=CLOSE, atol=CLOSE)
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)


def linear(*, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*SIZES, bias=bias)


def adapted(config: Any = None, **options: Any) -> Any:
    """The head of a tiny model with an adapter on it that is no longer an identity; and the PeftModel around."""
    config = config or LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, **options)
    model = get_peft_model(tiny_model(), config)
    return model, model.base_model.model.get_output_embeddings()


# -- taken as matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_head(bias: bool, frozen: bool, as_matrices: list[int]) -> None:
    head = linear(bias=bias).requires_grad_(not frozen)
    assert_right(head)
    assert as_matrices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.5, "evaluating": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_a_head_with_lora(options: dict[str, Any], as_matrices: list[int]) -> None:
    evaluating = options.pop("evaluating", False)
    model, head = adapted(**options)
    model.train(not evaluating)
    assert_right(head)
    assert as_matrices


def test_a_head_with_lora_that_has_a_bias(as_matrices: list[int]) -> None:
    config = LoraConfig(r=2, target_modules=["1"], init_lora_weights=False, lora_bias=True)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), linear(bias=True)), config)
    assert_right(model.base_model.model[1])
    assert as_matrices


def test_several_adapters_and_none(as_matrices: list[int]) -> None:
    model, head = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = head(torch.ones(1, 32))
    assert_right(head)
    model.set_adapter("other")
    assert not torch.allclose(head(torch.ones(1, 32)), both)
    assert_right(head)
    with model.disable_adapter():
        assert_right(head)
    assert len(as_matrices) == 3


def test_an_adapter_that_is_merged(as_matrices: list[int]) -> None:
    model, head = adapted()
    hidden, targets = torch.randn(NUM_TOKENS, 32), torch.arange(NUM_TOKENS)
    with model.disable_adapter():
        without = token_stats(head, hidden, targets, TRANSFORM).logps
    model.merge_adapter()
    assert_right(head)
    assert len(as_matrices) == 2
    with model.disable_adapter():  # PEFT takes it out of the weight when the head is called
        torch.testing.assert_close(token_stats(head, hidden, targets, TRANSFORM).logps, without, rtol=1e-4, atol=1e-4)
    assert not head.merged
    assert len(as_matrices) == 2


def test_a_head_that_is_trained_beside_an_adapter(as_matrices: list[int]) -> None:
    """PEFT's ``modules_to_save``: a copy of the head, or the original where the adapter is off."""
    model, head = adapted(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    assert_right(head)
    with model.disable_adapter():
        assert_right(head)
    assert len(as_matrices) == 2


def test_a_tied_head_adds_to_the_embeddings_gradient(as_matrices: list[int]) -> None:
    model = tiny_model(tie_word_embeddings=True)
    ids, targets = torch.arange(5), torch.arange(5) + 7
    weight = model.get_input_embeddings().weight

    def gradient(stats: Callable[[Tensor], TokenStats]) -> Tensor:
        return torch.autograd.grad(stats(model.get_input_embeddings()(ids)).logps.sum(), weight)[0]

    head = model.get_output_embeddings()
    found = gradient(lambda hidden: token_stats(head, hidden, targets, TRANSFORM))
    expected = gradient(lambda hidden: stats_of_logits(TRANSFORM(head(hidden)), targets))
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    assert as_matrices


def test_parametrised_weights(as_matrices: list[int]) -> None:
    """A weight that is computed when it is read."""
    head = nn.utils.parametrizations.weight_norm(linear())
    assert_right(head)
    assert as_matrices


# -- called as they are ------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked(where: str) -> nn.Module:
    """A head to which somebody listens, and needs logits for it."""
    head = linear()
    register: dict[str, Callable[[], Any]] = {
        "before": lambda: head.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        "after": lambda: head.register_forward_hook(lambda module, args, output: output * 2),
        "backward": lambda: head.register_full_backward_hook(lambda module, given, found: (2 * given[0],)),
    }
    register[where]()
    return head


def replaced() -> nn.Module:
    head = linear()
    head.forward = lambda x: 3 * nn.functional.linear(x, head.weight)
    return head


def offloaded() -> nn.Module:
    head = linear()
    return add_hook_to_module(head, AlignDevicesHook(execution_device="cpu"))


def listened_to_inside() -> nn.Module:
    _, head = adapted()
    head.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return head


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "a module with code of its own": lambda: nn.Sequential(linear(), nn.Tanh()),
    "a subclass with code of its own": lambda: Scaled(*SIZES, bias=False),
    "a hook before": lambda: hooked("before"),
    "a hook after": lambda: hooked("after"),
    "a hook on the gradient": lambda: hooked("backward"),
    "a hook inside": listened_to_inside,
    "another forward": replaced,
    "accelerate's hooks": offloaded,
    "DoRA": lambda: adapted(use_dora=True)[1],
    "IA3": lambda: adapted(IA3Config(target_modules=["lm_head"], feedforward_modules=[], init_ia3_weights=False))[1],
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_head_that_is_not_known_is_called_as_it_is(kind: str, as_matrices: list[int]) -> None:
    head = UNKNOWN[kind]()
    assert_right(head)
    assert not as_matrices


def test_active_dropout_is_not_left_out(as_matrices: list[int]) -> None:
    model, head = adapted(lora_dropout=0.9)
    model.train()
    hidden, targets = torch.randn(NUM_TOKENS, 32), torch.arange(NUM_TOKENS)
    first, second = (token_stats(head, hidden, targets, TRANSFORM).logps for _ in range(2))
    assert not torch.allclose(first, second)
    assert not as_matrices


def test_a_weight_that_is_no_plain_matrix(as_matrices: list[int]) -> None:
    class Spread(Tensor):
        """Stands for a DTensor, or a quantised weight."""

    head = linear()
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Spread))
    assert_right(head)
    assert not as_matrices


# -- the call of the module --------------------------------------------------------------------------------------------


def test_the_head_stays_what_it_was() -> None:
    head = linear()
    before, names = head(torch.ones(2, 6)), list(head.state_dict())
    token_stats(head, torch.ones(2, 6), torch.tensor([0, 1]), TRANSFORM)
    assert torch.equal(head(torch.ones(2, 6)), before)
    assert list(head.state_dict()) == names


def test_a_copy_of_a_head_has_its_own_weights(as_matrices: list[int]) -> None:
    head = linear()
    assert_right(head)
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.weight.mul_(2)
    assert_right(other, expected_head=lambda x: nn.functional.linear(x, other.weight))
    assert len(as_matrices) == 2


def test_a_head_that_has_been_wrapped_since(as_matrices: list[int]) -> None:
    """An adapter that comes later finds a head whose forward is replaced already."""
    model = tiny_model()
    assert_right(model.lm_head)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config)
    assert_right(model.base_model.model.lm_head)
    assert len(as_matrices) == 2


class Engine(ModuleType):
    """Stands for DeepSpeed's ZeRO-3: weights are there from before a module's forward to after it, and again from
    before the backward of what the forward returned. Tensors are looked for in lists, tuples and dicts."""

    def __init__(self, *modules: nn.Module) -> None:
        self.whole = {module: module.weight.data for module in modules}
        for module in modules:
            module.register_forward_pre_hook(made_by_deepspeed(lambda module, args: self.gather(module)))
            module.register_forward_hook(made_by_deepspeed(self.after))
            self.release(module)

    def gather(self, module: nn.Module) -> None:
        module.weight.data = self.whole[module]

    def release(self, module: nn.Module) -> None:
        module.weight.data = torch.empty(0)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output.values() if isinstance(output, dict) else [output]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gather(module))
        self.release(module)


def made_by_deepspeed(hook: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any) -> Any:
        return hook(*args)

    named.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return named


@pytest.mark.parametrize("lora", [False, True], ids=["linear", "lora"])
@pytest.mark.parametrize("caching", [False, True], ids=["recompute", "cached"])
def test_weights_that_an_engine_brings_together(
    lora: bool, caching: bool, as_matrices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the head's own module are there to be read. Those of modules within come when these are called."""
    monkeypatch.setattr("prefopt.scoring.head.plan.is_caching", caching)
    head = adapted()[1] if lora else linear()
    plain = copy.deepcopy(head)
    modules = [head.base_layer, head.lora_A["default"], head.lora_B["default"]] if lora else [head]
    engine = Engine(*modules)
    hidden, targets = torch.randn(NUM_TOKENS, 32 if lora else 6), torch.arange(NUM_TOKENS)
    found = token_stats(head, hidden, targets, TRANSFORM)
    found.logps.sum().backward()
    for module in modules:
        engine.gather(module)
    expected = stats_of_logits(TRANSFORM(plain(hidden)), targets)
    expected.logps.sum().backward()
    torch.testing.assert_close(found.logps, expected.logps)
    for ours, theirs in zip(head.parameters(), plain.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=CLOSE, atol=CLOSE)
    assert bool(as_matrices) != lora


@pytest.mark.parametrize("vocab_size", [5, 10_000])
def test_the_rows_of_the_head_count_and_not_the_config(vocab_size: int) -> None:
    """Heads are padded and resized; the config may say otherwise."""
    model = tiny_model()
    model.config.vocab_size = vocab_size
    install(model)
    masks = {"chosen": (True,) * 3, "rejected": (True,) * 2}
    example = TokenizedExample(0, (9, 10), {"chosen": (63, 1, 2), "rejected": (0, 5)}, masks)
    batch = pad_batch([example], PAIR)
    torch.testing.assert_close(score(model, batch).tokens.logps, plain_scores(model, batch).tokens.logps)
