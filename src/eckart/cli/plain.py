"""Records as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any


def as_plain(value: Any) -> Any:
    """Dataclasses and mappings become objects, sets sorted lists, paths text, NaN and infinity null.

    Raises TypeError for anything else that JSON does not know, a tensor or a function.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((as_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    raise TypeError(f"expected plain data; got {type(value).__name__}")
