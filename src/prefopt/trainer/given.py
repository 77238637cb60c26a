"""Which options of a config its user set: a default can mean "allowed", an explicit value is obeyed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Given", "fresh_names"]


class Given(tuple[str, ...]):
    """Names of the options that were set by hand, in order of the alphabet.

    It is the value of a config's field ``user_set``, so that ``dataclasses.replace``, pickling and
    ``Config(**config.to_dict())`` carry it along. In JSON it is a list of names.

    ``as_made`` holds the values the finished config had. What differs from it was set later: by assignment,
    or in ``dataclasses.replace``, which passes every field and so cannot be told from a full constructor call.
    """

    as_made: dict[str, Any]

    @classmethod
    def of(cls, names: Iterable[str], values: Mapping[str, Any]) -> Given:
        record = cls(sorted(names))
        record.as_made = dict(values)
        return record


def fresh_names(passed: Mapping[str, Any]) -> frozenset[str]:
    """Names that one constructor call sets.

    Args:
        passed: The call's arguments by name. With ``user_set`` among them the call copies another config: then
            only values that differ from that config's are new.

    Example:
        >>> sorted(fresh_names({"beta": 0.1, "seed": 1}))
        ['beta', 'seed']
        >>> sorted(fresh_names({"beta": 0.2, "seed": 1, "user_set": Given.of(["beta"], {"beta": 0.1, "seed": 1})}))
        ['beta']
    """
    record = passed.get("user_set")
    names = [name for name in passed if name != "user_set"]
    if record is None:
        return frozenset(names)
    made = getattr(record, "as_made", None)
    if made is None:  # rebuilt from a dict or from JSON: the list is all there is
        return frozenset(record)
    return frozenset(name for name in names if name not in made or passed[name] != made[name])
