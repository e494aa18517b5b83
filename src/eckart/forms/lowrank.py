"""A product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from eckart.errors import InputError
from eckart.records import FormKind


@dataclass(frozen=True, eq=False)
class LowRank:
    """W = b a with a (k × in) and b (out × k): k(m+n) numbers."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    kind: ClassVar[FormKind] = "lowrank"

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InputError(
                f"LowRank expects a (k × in) and b (out × k); got a {tuple(self.a.shape)} and b {tuple(self.b.shape)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def numel(self) -> int:
        return self.a.numel() + self.b.numel()

    @property
    def macs(self) -> int:
        return self.numel

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dense(self) -> Tensor:
        return self.b @ self.a

    def apply(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.a), self.b, self.bias)
