"""Parts of an optimizer by name, and their numbers as plain entries of a parameter group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, field, fields
from typing import Any

from eckart.errors import InputError, unknown


def knob(default: Any, key: str) -> Any:
    """A field of a part that is called ``key`` in parameter groups, where all parts share one name space."""
    return field(default=default, metadata={"key": key})


def key_of(f: Field[Any]) -> str:
    """What a field of a part is called in parameter groups."""
    return str(f.metadata.get("key", f.name))


def name_of(kind: str, value: Any, table: Mapping[str, type]) -> str:
    """The name of a part given as such or as an instance. Raises InputError for anything else."""
    if isinstance(value, str):
        if value not in table:
            raise InputError(unknown(kind, value, table))
        return value
    for name, cls in table.items():
        if type(value) is cls:
            return name
    raise InputError(f"{kind} is one of {', '.join(table)}, by name or as an object; got {value!r}.")


def knobs_of(value: Any) -> dict[str, Any]:
    """The numbers of an instance, by their keys; nothing for a name."""
    return {} if isinstance(value, str) else {key_of(f): getattr(value, f.name) for f in fields(value)}


def keys_of(classes: Iterable[type]) -> set[str]:
    return {key_of(f) for cls in classes for f in fields(cls)}


def built(cls: type, group: Mapping[str, Any]) -> Any:
    """The part, of the numbers that stand in the group now; its own defaults for those that do not."""
    return cls(**{f.name: group[key_of(f)] for f in fields(cls) if key_of(f) in group})


def number_fault(
    name: str, value: Any, low: float, high: float = float("inf"), *, open_high: bool = False
) -> list[str]:
    """What is wrong with a number that should lie in [low, high], or in [low, high) if ``open_high``."""
    try:
        inside = low <= float(value) < high if open_high else low <= float(value) <= high
    except (TypeError, ValueError):
        inside = False
    closing = ")" if open_high or high == float("inf") else "]"
    return [] if inside else [f"{name} is a number in [{low:g}, {high:g}{closing}; got {value!r}"]
