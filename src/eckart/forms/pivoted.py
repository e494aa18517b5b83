"""k rows kept as they are, the others as combinations of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from eckart.errors import InputError
from eckart.records import FormKind


@dataclass(frozen=True, eq=False)
class Pivoted:
    """W = [a; b a] with its rows put back in order: k(m+n−k) numbers and m indices.

    ``a`` (k × in) holds k rows of W, ``b`` (out−k × k) writes the remaining rows in terms of them.
    ``index`` (out,) says where each row of W lies in [a; b a], so that W = [a; b a][index]. Every
    matrix of rank k has this form exactly (interpolative decomposition), with k² fewer numbers than two factors.
    """

    a: Tensor
    b: Tensor
    index: Tensor
    bias: Tensor | None = None
    kind: ClassVar[FormKind] = "pivoted"

    def __post_init__(self) -> None:
        k, m = self.a.shape[0], self.index.numel()
        if self.b.shape != (m - k, k):
            raise InputError(f"Pivoted expects b of shape (out − k, k) = ({m - k}, {k}); got {tuple(self.b.shape)}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.numel(), self.a.shape[1]

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
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.a.nbytes + self.b.nbytes + self.index.nbytes + bias

    def dense(self) -> Tensor:
        return torch.cat([self.a, self.b @ self.a])[self.index]

    def apply(self, x: Tensor) -> Tensor:
        kept = linear(x, self.a)
        y = torch.cat([kept, linear(kept, self.b)], dim=-1)[..., self.index]
        return y if self.bias is None else y + self.bias
