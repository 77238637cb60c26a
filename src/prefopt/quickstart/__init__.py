"""What the package ships so that it runs with nothing else: a model, a preference set, `prefopt quickstart`."""

from pathlib import Path

from prefopt.quickstart.task import check, preference_set

__all__ = ["ASSETS", "check", "preference_set"]

ASSETS = Path(__file__).parent / "assets"
"""The model's folder, for `from_pretrained`: a Llama of 270,000 parameters that can do the task but does not listen."""
