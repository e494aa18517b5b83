"""A matrix as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from eckart.records import FormKind


@dataclass(frozen=True, eq=False)
class Dense:
    """W itself, (out × in): m·n numbers."""

    weight: Tensor
    bias: Tensor | None = None
    kind: ClassVar[FormKind] = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def macs(self) -> int:
        return self.numel

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dense(self) -> Tensor:
        return self.weight

    def apply(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
