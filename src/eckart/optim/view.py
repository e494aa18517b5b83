"""A parameter as the matrices that it consists of."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

View = Literal["auto", "stack", "flatten"]
Side = Literal["auto", "rows", "columns"]


@dataclass(frozen=True)
class Piece:
    """``batch`` matrices of ``rows`` × ``columns`` (outputs × inputs) in one parameter."""

    batch: int
    rows: int
    columns: int
    start: int
    """First of its rows in the parameter: above 0 in fused maps that are split."""
    suffix: str
    """What its entries in the state end with: nothing for a parameter of one piece, else ``.0``, ``.1``, …"""

    @property
    def smaller(self) -> int:
        return min(self.rows, self.columns)


@functools.lru_cache(maxsize=4096)
def pieces(shape: tuple[int, ...], view: View, split: tuple[int, ...] | None, transposed: bool) -> tuple[Piece, ...]:
    """The matrices of a parameter of ``shape``, at least two-dimensional.

    Two dimensions are one matrix. Of three, "auto" and "stack" make a stack of matrices (experts), "flatten" and all of
    four and more (convolutions) one of out × rest. ``split`` cuts its rows into blocks of these sizes.
    """
    if len(shape) == 2 or view == "flatten" or len(shape) > 3:
        batch, rows, columns = 1, shape[0], math.prod(shape[1:])
    else:
        batch, rows, columns = shape
    if transposed:
        rows, columns = columns, rows
    sizes = split or (rows,)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Piece(batch, size, columns, start, f".{i}" if len(sizes) > 1 else "")
        for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
    )


def matrices(T: Tensor, view: View, transposed: bool) -> Tensor:
    """(batch, rows, columns) of a parameter or its gradient: a view where strides allow it, else a copy."""
    if T.ndim == 2:
        M = T.unsqueeze(0)
    elif T.ndim == 3 and view != "flatten":
        M = T
    else:
        M = T.reshape(1, T.shape[0], -1)
    return M.mT if transposed else M


def taken(M: Tensor, piece: Piece) -> Tensor:
    """The rows of a piece."""
    return M if M.shape[1] == piece.rows else M[:, piece.start : piece.start + piece.rows]


def rank_of(rank: int | float, piece: Piece) -> int:
    """A fraction counts from the smaller side; at least 1."""
    return rank if isinstance(rank, int) else max(1, round(rank * piece.smaller))
