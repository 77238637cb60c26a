"""Names, parameters and defaults: what a TRL script says means the same here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
from parity_harness import classes

pytestmark = pytest.mark.trl

METHODS = ["dpo", "cpo", "tpo"]

OTHER_DEFAULTS = {"logging_nan_inf_filter": False, "bf16": None, "pad_to_multiple_of": "auto"}
"""Options whose default is written otherwise here; see docs/differences.md. ``pad_to_multiple_of`` differs in TPO
alone, where it resolves to TRL's None everywhere but on Neuron."""

NAMES = {
    "trl": ["DPOConfig", "DPOTrainer", "ModelConfig", "ScriptArguments", "TrlParser", "DatasetMixtureConfig"],
    "trl.trainer.dpo_trainer": ["DataCollatorForPreference", "DataCollatorForVisionPreference"],
    "trl.experimental.tpo.tpo_trainer": ["DataCollatorForTriplePreference"],
}
NAMES["trl"] += ["get_dataset", "get_peft_config", "get_quantization_config", "BEMACallback"]


@pytest.mark.parametrize(("home", "name"), [(home, name) for home, names in NAMES.items() for name in names])
def test_a_public_name_is_here(home: str, name: str) -> None:
    pytest.importorskip("trl")
    assert getattr(importlib.import_module(home), name)
    assert getattr(importlib.import_module("prefopt"), name)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_a_trainer_keep_their_order_and_defaults(method: str) -> None:
    ours, theirs = (
        list(inspect.signature(classes(library, method)[1].__init__).parameters.values())
        for library in ("prefopt", "trl")
    )
    for mine, other in zip(ours, theirs, strict=False):
        assert mine.name == other.name
        assert mine.default == other.default or (mine.name == "model" and mine.default is None)
    assert all(extra.kind is inspect.Parameter.KEYWORD_ONLY for extra in ours[len(theirs) :])


@pytest.mark.parametrize("method", METHODS)
def test_options_keep_their_names_and_defaults(method: str) -> None:
    ours, theirs = (
        {field.name: field for field in dataclasses.fields(classes(library, method)[0])}
        for library in ("prefopt", "trl")
    )
    assert set(theirs) <= set(ours)
    for name, field in theirs.items():
        mine = ours[name]
        made = [f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in (mine, field)]
        if name in OTHER_DEFAULTS and made[0] != made[1]:
            made[1] = OTHER_DEFAULTS[name]
        assert made[0] == made[1], name


@pytest.mark.parametrize("method", METHODS)
def test_resolved_options_are_trls(method: str, tmp_path: Path) -> None:
    """After the checks of both: the values that a run uses, on a machine without an accelerator."""
    ours, theirs = (classes(library, method)[0](str(tmp_path), bf16=False) for library in ("prefopt", "trl"))
    differing = {
        field.name for field in dataclasses.fields(theirs) if getattr(theirs, field.name) != getattr(ours, field.name)
    }
    assert differing <= {"logging_nan_inf_filter", "logging_dir", "run_name"}
