"""The contract of every form."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from eckart.records import FormKind


@runtime_checkable
class Form(Protocol):
    """One matrix W (out × in) with an optional bias (out), stored in few numbers."""

    kind: ClassVar[FormKind]

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the matrix that it stands for."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def numel(self) -> int:
        """Stored numbers, biases left out; indices are not parameters and count only in ``nbytes``."""
        ...

    @property
    def macs(self) -> int:
        """Multiply-adds for one input vector."""
        ...

    @property
    def nbytes(self) -> int:
        """Stored bytes, biases and indices included."""
        ...

    def dense(self) -> Tensor:
        """The (out × in) matrix."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """W x + bias for x of shape (…, in); returns (…, out)."""
        ...
