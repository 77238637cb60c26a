"""What the tests of the configs share."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from prefopt.trainer.config import CPOConfig, DPOConfig, PreferenceConfig, TPOConfig

CONFIGS = (DPOConfig, CPOConfig, TPOConfig)


def make(config: type[PreferenceConfig], **options: Any) -> PreferenceConfig:
    return config("out", report_to="none", **options)


def mistakes_of(config: type[PreferenceConfig], **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make(config, **options)
    return str(caught.value)


def warnings_of(config: type[PreferenceConfig], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(config, **options)
    return [str(item.message) for item in caught]
