"""``eckart.methods``: the table."""

from __future__ import annotations

from eckart.compression import METHODS, CompressMethod


def methods() -> tuple[CompressMethod, ...]:
    """Every compression method, in the order of the table."""
    return tuple(METHODS.values())
