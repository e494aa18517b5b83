"""Where the parts of a matrix lie: what is summed over a whole matrix goes through here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.lowbit import CACHED_ENTRIES


@dataclass(frozen=True)
class Layout:
    """Matrices that lie whole on this process.

    Matrices are (batch, d, k): d is the side that the basis spans, k the other one. Where matrices are sharded,
    it is along k or over the batch, and a subclass sums over processes.
    """

    def along(self, partial: Tensor) -> Tensor:
        """What was summed over k on this process, summed over all of k."""
        return partial

    def total(self, partial: Tensor) -> Tensor:
        """What was summed over d and k on this process, summed over the whole matrix."""
        return partial

    def peak(self, partial: Tensor) -> Tensor:
        """The largest over d and k on this process, over the whole matrix."""
        return partial

    def mean(self, values: Tensor) -> float:
        """Of one number for each matrix on this process, over the whole stack."""
        return float(values.mean())

    def by_columns(self, rows: int, columns: int) -> bool:
        """Whether side="auto" spans the columns: the shorter side, or the one that is not sharded."""
        return columns < rows

    def length(self, k: int) -> int:
        """The length of k over all processes."""
        return k

    @property
    def spread(self) -> bool:
        """Whether matrices are cut."""
        return False

    @property
    def first(self) -> int:
        """Which matrix of the stack is the first on this process."""
        return 0

    @property
    def place(self) -> int:
        """Of this process among those that have different parts."""
        return 0

    def mine(self, batch: int, d: int, k: int) -> tuple[int, int, int]:
        """What this process has of matrices (batch, d, k)."""
        return batch, d, k

    def local(self, T: Tensor) -> Tensor:
        """What this process works on of a parameter or its gradient."""
        return local(T)

    def kept(self, name: str, T: Tensor) -> Tensor:
        """An entry of the state, as it is stored."""
        return T

    def whole(self, M: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of whole matrices (n, d, k), each on one process: what this process has of the results."""
        return function(M)


WHOLE = Layout()


def local(T: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    found: Tensor = T.to_local() if hasattr(T, "to_local") else T
    return found


def square_sums(X: Tensor, layout: Layout) -> Tensor:
    """(batch, d): squared norms of the rows of X over all of k."""
    return layout.along(_over_last(X, squares=True))


def absolute_sums(X: Tensor, layout: Layout) -> Tensor:
    """(batch, d): sums of the magnitudes in the rows of X over all of k."""
    return layout.along(_over_last(X, squares=False))


def channel_norms(X: Tensor) -> Tensor:
    """(batch, 1, k): norms over the side d, which is never sharded."""
    return X.square().sum(-2, keepdim=True).sqrt_()


def frobenius(X: Tensor, layout: Layout) -> Tensor:
    """(batch, 1, 1): the norms of whole matrices."""
    return layout.total(X.square().sum((-2, -1), keepdim=True)).sqrt_()


def mean_square(X: Tensor, layout: Layout) -> Tensor:
    """(batch, 1, 1): the mean square of all entries."""
    return layout.total(X.square().sum((-2, -1), keepdim=True)) / (X.shape[-2] * layout.length(X.shape[-1]))


def gram(X: Tensor, layout: Layout) -> Tensor:
    """(batch, d, d): X Xᵀ."""
    return layout.along(X @ X.mT)


def _over_last(X: Tensor, *, squares: bool) -> Tensor:
    if X.stride(-1) == 1:
        order = 2 if squares else 1
        norms: Tensor = torch.linalg.vector_norm(X, order, dim=-1)
        return norms.square_() if squares else norms
    # Across the rows of memory sums are fast and norms are not; by blocks that stay in the cache.
    sums = X.new_zeros(X.shape[:-1])
    for block in torch.split(X, max(1, CACHED_ENTRIES // max(1, X.shape[-2])), -1):
        sums += (block.square() if squares else block.abs()).sum(-1)
    return sums
