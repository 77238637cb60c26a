"""An adapter merged into its base model, which is written only if it computes the same."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import prefopt
from prefopt import files
from prefopt.checkpoints.folder import checkpoints_in
from prefopt.checkpoints.publish import install, staged_model
from prefopt.trainer.generation import generated
from prefopt.trainer.saving.adapter_files import base_of_adapter
from prefopt.trainer.setup import check_output_dir, load_model, load_processing_class
from prefopt.types import TokenizedExample

__all__ = ["LOGIT_TOLERANCE", "Merged", "NotTheSameError", "adapter_folder", "merge"]

LOGIT_TOLERANCE = 1e-5
"""Of the largest logit. In float32 ``(W + BA) x`` and ``Wx + B(Ax)`` differ by some 1e-7 of it in each layer."""
NUM_PROBES, PROBE_LENGTH, NEW_TOKENS = 4, 48, 32
PROMPTS = ("The", "Question: What is the capital of France? Answer:", "1, 2, 3,", "Once upon a time")


class NotTheSameError(ValueError):
    """The merged model does not compute what base and adapter compute; nothing was written."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how it compares."""

    base: str
    adapter: Path
    logit_difference: float
    """Largest difference to base and adapter in float32, as a share of the largest logit."""
    same_texts: int
    """Of the greedy texts that both gave, how many are the same."""
    num_texts: int


def adapter_folder(run: str | Path) -> Path:
    """The folder with the adapter of a run: its own, or that of its checkpoint of the most steps.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapter.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder; name a run's output_dir or one of its checkpoints")
    for place in (folder, *checkpoints_in(folder).values()):
        if (place / "adapter_config.json").is_file():
            return place
    if (folder / "config.json").is_file():
        raise ValueError(f"{run}: is a whole model; there is no adapter in it to merge")
    raise ValueError(f"{run}: holds no adapter (no adapter_config.json), nor do its checkpoints")


def merge(run: str | Path, output_dir: str | Path, *, dtype: str = "float32", accept_rounding: bool = False) -> Merged:
    """Merge the adapter of a run into its base, in float32, and write the model, with its tokenizer.

    The model is written beside, read back, and put in place if for random tokens its logits are those of base and
    adapter, and if it goes on from a few prompts with the same text. The base is loaded as its config says, without
    quantisation.

    Args:
        run: a folder with an adapter, or one whose checkpoints have one.
        output_dir: of the merged model; new or empty.
        dtype: of the weights that are written. A type of 16 bits rounds them: then the texts alone decide.
        accept_rounding: whether other texts are accepted, of a type of 16 bits.

    Raises:
        NotTheSameError: the merged model computes something else.
        ValueError: the adapter is of a kind that cannot be merged, or ``output_dir`` is a file or not empty.
        FileNotFoundError: there is no such run.
    """
    adapter, folder = adapter_folder(run), Path(output_dir)
    check_output_dir(str(folder))
    was_there = folder.exists()
    if was_there and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: is not empty; name a new folder")
    args = prefopt.DPOConfig(str(folder), bf16=False, report_to="none")
    base = str(base_of_adapter(adapter)[0])  # type: ignore[index]  # there is an adapter's config
    refuse_virtual_tokens(adapter)
    processing_class = load_processing_class(None, str(adapter), args)
    model, probe, expected = checked_merge(adapter, base, processing_class, args)
    staged = staged_model(folder)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(staged)
        processing_class.save_pretrained(staged)
        del model
        gc.collect()
        exact = dtype == "float32"
        found = probe.results(load_model(str(staged), args).eval())
        difference, same = compared(expected, found, by_logits=exact, by_texts=exact or not accept_rounding)
        install(staged, folder)
    finally:
        files.remove_tree(staged)
        if not was_there and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    return Merged(base, adapter, difference, same, len(expected.texts))


def checked_merge(adapter: Path, base: str, processing_class: Any, args: Any) -> tuple[Any, Probe, Results]:
    """The merged model, which computes the same in memory; the probe, and what base and adapter made of it.

    Raises:
        NotTheSameError: the merged model computes something else.
        ValueError: the base is quantised.
    """
    model: Any = load_model(str(adapter), args).eval()
    refuse_quantised(model, adapter, base)
    probe = Probe(model, processing_class)
    expected = probe.results(model)
    model = merged_model(model)
    compared(expected, probe.results(model), by_logits=True, by_texts=True)
    return model, probe, expected


def refuse_virtual_tokens(adapter: Path) -> None:
    """Raises: ValueError for adapters that are no change of weights."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning:
        raise ValueError(
            f"{adapter}: an adapter of type {config.peft_type.value} is no change of the base's weights and cannot be "
            "merged into them; load base and adapter together."
        )


def refuse_quantised(model: Any, adapter: Path, base: str) -> None:
    """Raises: ValueError for a base in which a merged adapter would be rounded away."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{adapter}: its base {base} is quantised, and merging would round the adapter away. Put the name of the "
            "model before quantisation into base_model_name_or_path of adapter_config.json."
        )


def merged_model(model: Any) -> Any:
    """The base with the active adapters merged in; head and embeddings are no longer tied where one alone has changed.

    Raises:
        NotTheSameError: PEFT finds weights that are not finite.
    """
    inner = model.get_base_model()
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = head is not None and plain(head).weight is plain(embeddings).weight
    if tied and any(plain(module) is not module for module in (head, embeddings)):
        plain(head).weight = nn.Parameter(plain(head).weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # looked after here
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise NotTheSameError(f"{error}. Nothing was written.") from error
    if tied:
        config = merged.config.get_text_config(decoder=True)
        head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
        config.tie_word_embeddings = merged.config.tie_word_embeddings = head.weight is embeddings.weight
    return merged


def plain(module: Any) -> Any:
    """The module of the base that an adapter is on, or in place of."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


class Results(NamedTuple):
    """What a model makes of the probe."""

    logits: Tensor
    """[NUM_PROBES, PROBE_LENGTH, V], on the host."""
    texts: list[list[int]]
    """Greedy completions of the prompts, as token ids."""


class Probe:
    """Inputs for models that should be the same: random tokens for their logits, prompts that they go on from.

    Args:
        model: any of them.
        processing_class: its tokenizer or processor.
    """

    def __init__(self, model: Any, processing_class: Any) -> None:
        self.tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        known = min(len(self.tokenizer), model.get_input_embeddings().weight.shape[0])
        self.ids = torch.randint(known, (NUM_PROBES, PROBE_LENGTH), generator=torch.Generator().manual_seed(0))
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        self.examples = [TokenizedExample(row, ids, {}, {}) for row, ids in enumerate(prompts)]

    @torch.no_grad()
    def results(self, model: Any) -> Results:
        ids = self.ids.to(model.device)
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, **decoder, use_cache=False).logits.float().cpu()
        return Results(logits, generated(model, self.examples, self.tokenizer, NEW_TOKENS))


def compared(expected: Results, found: Results, *, by_logits: bool, by_texts: bool) -> tuple[float, int]:
    """Largest difference of logits, as a share of the largest, and the number of texts that are the same.

    Raises:
        NotTheSameError: one of those by which it is decided is not as it should be.
    """
    difference = float((expected.logits - found.logits).abs().max() / expected.logits.abs().max())
    same = sum(one == other for one, other in zip(expected.texts, found.texts, strict=True))
    told = f"logits differ by up to {difference:.1e} of the largest, {same} of {len(expected.texts)} texts are the same"
    if not math.isfinite(difference):
        raise NotTheSameError(
            "the merged model's logits are not finite. Nothing was written; --dtype float32 may help."
        )
    if by_logits and not difference <= LOGIT_TOLERANCE:
        raise NotTheSameError(
            f"the merged model is not the same: {told}; logits may differ by {LOGIT_TOLERANCE:g}. Nothing was written."
        )
    if by_texts and same < len(expected.texts):
        raise NotTheSameError(
            f"the merged model does not say the same: {told}. Nothing was written. Where a type of 16 bits has rounded "
            "the weights, --dtype float32 keeps them, and --accept_rounding accepts other texts."
        )
    return difference, same
