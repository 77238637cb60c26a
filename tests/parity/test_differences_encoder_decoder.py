"""Encoder-decoder models: TRL 1.16 trains them in CPO alone, and not with the dropout that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from encoder_decoders import EOS, ended_tokenizer, tiny_encoder_decoder
from parity_harness import build, run
from tiny_models import standard_rows
from torch import nn

pytestmark = pytest.mark.trl


def arguments(kind: str = "t5", *, gold: bool = False, **changes: Any) -> dict[str, Any]:
    tokenizer = ended_tokenizer()
    tokenizer.pad_token = "<unk>"
    model = tiny_encoder_decoder(kind, seed=1, **changes)
    data = Dataset.from_dict(standard_rows(gold=gold))
    return {"model": model, "processing_class": tokenizer, "train_dataset": data}


@pytest.mark.parametrize("method", ["dpo", "tpo"])
def test_encoder_decoders_train_with_every_method(method: str) -> None:
    reference = {"ref_model": tiny_encoder_decoder("t5", seed=1)} if method == "dpo" else {}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):  # of the decoder, which got none
        run("trl", method, {}, **arguments(gold=method == "tpo"), **reference)
    log = run("prefopt", method, {}, **arguments(gold=method == "tpo"))
    assert all(row["loss"] > 0 for row in log)


def test_dropout_that_is_no_module_is_disabled_too() -> None:
    """T5's attention and BART's layers keep their probability as a number."""
    left = {}
    for library in ("trl", "prefopt"):
        model: Any = build(library, "cpo", {"max_completion_length": 128}, **arguments("bart", dropout=0.1)).model
        assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
        left[library] = model.model.encoder.layers[0].dropout
    assert left == {"trl": 0.1, "prefopt": 0.0}


def test_a_completion_that_was_cut_does_not_end() -> None:
    ends = {}
    for library, column in (("trl", "chosen_labels"), ("prefopt", "chosen_ids")):
        rows = build(library, "cpo", {"max_completion_length": 2}, **arguments()).train_dataset
        assert {len(row[column]) for row in rows} == {2}
        ends[library] = {row[column][-1] == EOS for row in rows}
    assert ends == {"trl": {True}, "prefopt": {False}}
