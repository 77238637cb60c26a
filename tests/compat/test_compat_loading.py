"""Models whose code comes with them, and tool calls in every way that ``datasets`` stores messages of unlike keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from parameters import pairs
from tiny_models import CHAT_TEMPLATE, save_tiny, word_tokenizer
from transformers import dynamic_module_utils

from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, TPOConfig, TPOTrainer
from prefopt.data import PrepareOptions, prepare_dataset

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model folder with code that transformers does not have; it is copied to a cache of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)  # do not ask on the terminal
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = Path(save_tiny(tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    return str(folder)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(DPOTrainer, DPOConfig), (CPOTrainer, CPOConfig), (TPOTrainer, TPOConfig)]
)
def test_code_of_a_model_runs_when_it_is_trusted(
    trainer_class: type, config_class: type, own_model: str, out: str
) -> None:
    rows = pairs(4, gold=True)
    with pytest.raises(ValueError, match="custom code"):
        trainer_class(own_model, args=config_class(out, report_to="none"), train_dataset=rows)
    args = config_class(out, report_to="none", trust_remote_code=True, max_steps=1, logging_steps=1)
    trainer = trainer_class(own_model, args=args, train_dataset=rows)
    assert type(trainer.model).__name__ == "OwnForCausalLM"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


ROWS = [
    {
        "prompt": [{"role": "user", "content": "mama"}],
        "chosen": [call("kaka", duration=600), {"role": "tool", "name": "kaka", "content": "lala"}],
        "rejected": [{"role": "assistant", "content": "dada"}],
    },
    {
        "prompt": [{"role": "user", "content": "baba"}],
        "chosen": [{"role": "assistant", "content": "bebe"}],
        "rejected": [call("lala", title="mama", artist="baba")],
    },
]
"""Messages and arguments with other keys in every row."""
COLUMNS = {column: [row[column] for row in ROWS] for column in ROWS[0]}


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(lambda: Dataset.from_dict(COLUMNS), id="missing keys as None"),
        pytest.param(lambda: Dataset.from_dict(COLUMNS, on_mixed_types="use_json"), id="JSON"),
        pytest.param(lambda: Dataset.from_dict(COLUMNS, on_mixed_types="use_json").to_iterable_dataset(), id="stream"),
    ],
)
def test_tool_calls_do_not_depend_on_how_they_are_stored(stored: Callable[[], Any]) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message.content }}{% for call in message.tool_calls %}{{ call.function.name }}"
        "{% for key, value in call.function.arguments.items() %} {{ value }} mama{% endfor %}{% endfor %}",
    )
    options = PrepareOptions(("chosen", "rejected"), None, "keep_start")
    as_given = IterableDataset.from_generator(lambda: iter(ROWS))
    expected = list(prepare_dataset(as_given, tokenizer, options, name="train"))
    assert tokenizer.decode(expected[1]["rejected_ids"]) == "lala mama mama baba mama <|im_end|>"
    assert list(prepare_dataset(stored(), tokenizer, options, name="train")) == expected
