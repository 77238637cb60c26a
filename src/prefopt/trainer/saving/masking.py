"""Options without what must stay secret: for files, logs, cards and reports."""

from __future__ import annotations

import os
import re
from typing import Any

__all__ = ["without_known_secrets", "without_secrets"]

SECRET = "<secret>"
"""What stands in a secret's place."""

SECRET_NAME = re.compile(
    r"(^|_)(token|passw(or)?d|passphrase|secret|credentials?|auth(orization)?|(api|access|private|secret)_?key)$", re.I
)
TOKENS_OF_TEXT = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|decoder_start|image|video|audio)_token$", re.I)
"""Names that look like a secret's and are a token of the vocabulary."""
SECRET_VALUE = re.compile(r"\b(hf|api_org|sk|ghp|gho|github_pat|glpat|xox[abp])[_-][A-Za-z0-9_-]{8,}")
"""Keys that show by their first letters whose they are."""
SHORTEST = 8
"""Characters of a secret of the environment: shorter ones, such as ``true``, are words of every message."""
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*@")
SECRET_IN_ADDRESS = re.compile(r"(?<=[?&])([\w-]*(?:token|key|secret|signature|password)=)[^&#\s]+", re.I)


def without_secrets(value: Any, name: str = "") -> Any:
    """``value`` with every secret in it replaced; mappings and lists are copied.

    A text is secret where its name says so (``hub_token``, ``api_key``, ``password``), however deep it lies, or
    where it shows by itself: a key with the prefix of its issuer, the user and password of an address.

    Args:
        value: of JSON's types.
        name: of the option that has it.
    """
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if SECRET_NAME.search(name) and not TOKENS_OF_TEXT.match(name):
        return SECRET
    return SECRET_VALUE.sub(SECRET, SECRET_IN_ADDRESS.sub(rf"\1{SECRET}", USER_IN_ADDRESS.sub("", value)))


def without_known_secrets(text: str) -> str:
    """``text`` without what the environment holds as secrets, and without what shows by itself that it is one."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, SECRET)
    return without_secrets(text)
