"""prefopt trains language models on preference data: DPO, CPO (SimPO, CPO-SimPO, AlphaPO) and TPO.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

HOME_OF = {
    "BEMACallback": "prefopt.trainer.callbacks",
    "CPOConfig": "prefopt.trainer.config",
    "CPOTrainer": "prefopt.trainer.cpo",
    "DPOConfig": "prefopt.trainer.config",
    "DPOTrainer": "prefopt.trainer.dpo",
    "DataCollatorForPreference": "prefopt.batching",
    "DataCollatorForTriplePreference": "prefopt.batching",
    "DataCollatorForVisionPreference": "prefopt.batching",
    "DatasetMixtureConfig": "prefopt.data",
    "ModelConfig": "prefopt.cli.model_config",
    "PrefParser": "prefopt.cli.parser",
    "ScriptArguments": "prefopt.cli.model_config",
    "TPOConfig": "prefopt.trainer.config",
    "TPOTrainer": "prefopt.trainer.tpo",
    "TrlParser": "prefopt.cli.parser",
    "get_dataset": "prefopt.data",
    "get_kbit_device_map": "prefopt.cli.model_config",
    "get_peft_config": "prefopt.cli.model_config",
    "get_quantization_config": "prefopt.cli.model_config",
}
"""Public name -> the module that defines it."""

ALIAS_OF = {"TrlParser": "PrefParser"}

__all__ = [
    "BEMACallback",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
    "DataCollatorForTriplePreference",
    "DataCollatorForVisionPreference",
    "DatasetMixtureConfig",
    "ModelConfig",
    "PrefParser",
    "ScriptArguments",
    "TPOConfig",
    "TPOTrainer",
    "TrlParser",
    "get_dataset",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
]

if TYPE_CHECKING:
    from prefopt.batching import (
        DataCollatorForPreference,
        DataCollatorForTriplePreference,
        DataCollatorForVisionPreference,
    )
    from prefopt.cli.model_config import (
        ModelConfig,
        ScriptArguments,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
    )
    from prefopt.cli.parser import PrefParser
    from prefopt.cli.parser import PrefParser as TrlParser
    from prefopt.data import DatasetMixtureConfig, get_dataset
    from prefopt.trainer.callbacks import BEMACallback
    from prefopt.trainer.config import CPOConfig, DPOConfig, TPOConfig
    from prefopt.trainer.cpo import CPOTrainer
    from prefopt.trainer.dpo import DPOTrainer
    from prefopt.trainer.tpo import TPOTrainer


def __getattr__(name: str) -> Any:
    if name not in HOME_OF:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    value = getattr(import_module(HOME_OF[name]), ALIAS_OF.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *HOME_OF]
