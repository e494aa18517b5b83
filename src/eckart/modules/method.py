"""The records of narrower modules: what a method is, and what it makes of one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from eckart.compression import Need
from eckart.records import Claim, Paper, Unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What takes the place of some rows, or of all columns, of one map. float64 on the CPU."""

    site: str
    side: Literal["rows", "columns"]
    weight: Tensor
    """(kept, in) for rows, (out, kept) for columns."""
    bias: Tensor | None
    """(kept,) for rows, (out,) for columns; None where the map ends without one."""
    start: int = 0
    stop: int = 0
    """The rows [start, stop) of the map that it replaces; for columns all of them."""
    positions: Tensor | None = None
    """(kept,) places of the kept rows (or columns) among those of the map; None where the order is all that counts."""
    second: Tensor | None = None
    """(kept, kept): of columns, the second moment of what they read."""


class PreparedUnit(Protocol):
    """A unit that was looked at once, and can be cut to any width."""

    @property
    def unit(self) -> Unit: ...

    @property
    def errors(self) -> Tensor:
        """(full_rank + 1,): the objective at width 0 … full, never rising; for ``modules`` in units of the loss."""

    def cut(self, width: int) -> tuple[Piece, ...]:
        """What the maps become at this width."""

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        """A map of the unit, and the dense (out, in) matrix and bias that in its place have the same effect."""


@dataclass(frozen=True, kw_only=True)
class ModuleMethod:
    """A way of making blocks narrower, as a value."""

    name: str
    summary: str
    paper: Paper
    needs: frozenset[Need]
    options: type[Any]
    loss_units: bool
    """Whether errors are rises of the loss, which one budget over all layers needs."""
    equal_heads: bool
    """Whether heads of a layer take directions in turn, so that their numbers differ by one at most."""
    prepare: Callable[..., PreparedUnit]
    """:func:`eckart.modules.prepare_unit` with the method's own scores."""
    claim: Claim
