"""Symmetric matrices, stored once: half of a file, half of what processes send each other."""

from __future__ import annotations

from torch import Tensor


def packed(stack: Tensor) -> Tensor:
    """(…, d, d), symmetric, → (…, d (d + 1) / 2): row i of the lower triangle has i + 1 numbers."""
    d = stack.shape[-1]
    rows = stack.new_empty(*stack.shape[:-2], d * (d + 1) // 2)
    for i in range(d):
        start = i * (i + 1) // 2
        rows[..., start : start + i + 1] = stack[..., i, : i + 1]
    return rows


def unpack_into(stack: Tensor, rows: Tensor) -> None:
    """The way back: writes the numbers of :func:`packed` into both triangles of ``stack`` (…, d, d)."""
    for i in range(stack.shape[-1]):
        row = rows[..., i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
        stack[..., i, : i + 1] = row
        stack[..., : i + 1, i] = row
