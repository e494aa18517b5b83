"""Subspaces: a basis of few directions on one side of a matrix, and how it is found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from eckart.linalg import dct, dct_columns, power_step
from eckart.linalg.power import orthonormal, warm_basis
from eckart.optim.layout import WHOLE, Layout, absolute_sums, gram, square_sums
from eckart.optim.parts import knob, number_fault
from eckart.optim.view import Side

Carry = Literal["keep", "rotate", "restart"]
HeldKind = Literal["basis", "index", "seed"]


class Basis(Protocol):
    """Directions Q (batch, d, r) of matrices X (batch, d, k)."""

    def down(self, X: Tensor) -> Tensor:
        """Qᵀ X (batch, r, k)."""
        ...

    def up(self, U: Tensor) -> Tensor:
        """Q U (batch, d, k), in U's dtype."""
        ...

    def add(self, W: Tensor, U: Tensor, decay: float, alpha: float) -> None:
        """W ← decay · W + alpha · Q U in place, for W in U's dtype."""
        ...

    def one(self, first: int, batch: int) -> Basis:
        """That of ``batch`` of its matrices."""
        ...


@dataclass(frozen=True)
class Columns:
    """A basis that is stored, or made, as a matrix; products run in ``dtype``."""

    Q: Tensor
    dtype: torch.dtype

    def down(self, X: Tensor) -> Tensor:
        out: Tensor = self.Q.to(self.dtype).mT @ X.to(self.dtype)
        return out.to(X.dtype)

    def up(self, U: Tensor) -> Tensor:
        return (self.Q.to(self.dtype) @ U.to(self.dtype)).to(U.dtype)

    def add(self, W: Tensor, U: Tensor, decay: float, alpha: float) -> None:
        if self.dtype != W.dtype:
            product = self.Q.to(self.dtype) @ U.to(self.dtype)
            if decay != 1:
                W.mul_(decay)
            W.add_(product, alpha=alpha)
        elif len(W) == 1:
            W[0].addmm_(self.Q[0].to(W.dtype), U[0], beta=decay, alpha=alpha)
        else:
            W.baddbmm_(self.Q.to(W.dtype), U, beta=decay, alpha=alpha)

    def one(self, first: int, batch: int) -> Basis:
        return Columns(self.Q[first : first + batch], self.dtype)


@dataclass(frozen=True)
class Picked:
    """Directions of the identity: the rows ``index`` (batch, r) of X, each once."""

    index: Tensor
    d: int

    def down(self, X: Tensor) -> Tensor:
        if len(X) == 1:
            if X.stride(-1) == 1:
                return X[0].index_select(0, self.index[0]).unsqueeze(0)
            return X[0].mT.index_select(1, self.index[0]).mT.contiguous().unsqueeze(0)  # along memory
        return X.gather(1, self._spread(X.shape[-1]))

    def up(self, U: Tensor) -> Tensor:
        return U.new_zeros(U.shape[0], self.d, U.shape[-1]).scatter_(1, self._spread(U.shape[-1]), U)

    def add(self, W: Tensor, U: Tensor, decay: float, alpha: float) -> None:
        if decay != 1:
            W.mul_(decay)
        if len(W) > 1:
            W.scatter_add_(1, self._spread(U.shape[-1]), U * alpha)
        elif W.stride(-1) == 1:
            W[0].index_add_(0, self.index[0], U[0], alpha=alpha)
        else:  # columns of memory: three times faster than adding one column after the other
            M, index = W[0].mT, self.index[0].long()
            M.index_copy_(1, index, M.index_select(1, index).add_(U[0].mT, alpha=alpha))

    def one(self, first: int, batch: int) -> Basis:
        return Picked(self.index[first : first + batch], self.d)

    def _spread(self, k: int) -> Tensor:
        return self.index.long().unsqueeze(-1).expand(-1, -1, k)


@dataclass(frozen=True)
class Fitted:
    """What a fit found: what is held from now on, and Qᵀ X where it came along."""

    held: Tensor
    low: Tensor | None = None


@dataclass(frozen=True)
class Subspaced:
    """What all subspaces have. The side of length d is spanned, and the moments are r × the other side."""

    rank: int | float = 0.25
    """An int counts directions, a float in (0, 1] is a share of the smaller side. A matrix whose spanned side is no
    longer than that is trained in full."""
    every: int = 10
    """Steps between two fits; they are spread over the parameters, so that no step has more than its share."""
    side: Side = "auto"
    """Which side the basis spans: "rows" (outputs), "columns", or "auto", the one that is not sharded, else the
    shorter."""
    carry: Carry = "keep"
    """What happens to the moments at a fit. "keep": they stay as coordinates. "rotate": first moments are turned into
    the new basis by R = Q_newᵀ Q_old, second ones by the squares of its entries. "restart": they begin at zero.
    Subspaces of single coordinates (Rows, DCT) keep those of coordinates that stay in both of the latter cases."""
    kind: ClassVar[HeldKind] = "basis"

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        """``held``: what the last fit gave. ``seeds``: one for each matrix and fit."""
        raise NotImplementedError

    def basis(self, held: Tensor, d: int, rank: int, like: Tensor, dtype: torch.dtype) -> Basis:
        return Columns(held, dtype)

    def faults(self) -> list[str]:
        found = []
        if isinstance(self.rank, bool) or not isinstance(self.rank, (int, float)):
            found.append(f"rank is an int of at least 1 or a share in (0, 1]; got {self.rank!r}")
        elif isinstance(self.rank, int) and self.rank < 1:
            found.append(f"rank counts directions, at least 1; got {self.rank!r}")
        elif isinstance(self.rank, float) and not 0 < self.rank <= 1:
            found.append(f"rank as a float is a share in (0, 1]; got {self.rank!r}. A number of directions is an int")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            found.append(f"every counts steps, an int of at least 1; got {self.every!r}")
        if self.side not in ("auto", "rows", "columns"):
            found.append(f"side is 'auto', 'rows' or 'columns'; got {self.side!r}")
        if self.carry not in ("keep", "rotate", "restart"):
            found.append(f"carry is 'keep', 'rotate' or 'restart'; got {self.carry!r}")
        return found


@dataclass(frozen=True)
class SVD(Subspaced):
    """The leading left singular vectors of X (GaLore), from the eigenvectors of X Xᵀ: d² k and an ``eigh`` of d³."""

    every: int = 200

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        return Fitted(_leading(gram(X, layout), rank).to(X.dtype))


@dataclass(frozen=True)
class Randomized(Subspaced):
    """Near the leading singular vectors: two products with X and one power pass, from random vectors at each fit."""

    every: int = 200
    oversample: int = knob(8, "subspace_oversample")

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        width = min(rank + self.oversample, X.shape[-2])
        Q = span_step(X, _random_basis(X, width, seeds), layout)
        B = Q.mT @ X
        return Fitted((Q @ _leading(gram(B, layout), rank).to(X.dtype)).contiguous())

    def faults(self) -> list[str]:
        return super().faults() + number_fault("subspace_oversample", self.oversample, 0)


@dataclass(frozen=True)
class Power(Subspaced):
    """Follows the leading singular vectors by one power step from the last basis: 2 d k r and the QR of d × r."""

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        return Fitted(span_step(X, _random_basis(X, rank, seeds) if held is None else held, layout))


@dataclass(frozen=True)
class Rows(Subspaced):
    """The r rows of X of the largest norms: no products at all, one look at X at a fit."""

    carry: Carry = "restart"
    kind: ClassVar[HeldKind] = "index"

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        return Fitted(_seated(_largest(square_sums(X, layout), rank), held, X.shape[-2]))

    def basis(self, held: Tensor, d: int, rank: int, like: Tensor, dtype: torch.dtype) -> Basis:
        return Picked(held, d)


@dataclass(frozen=True)
class DCT(Subspaced):
    """The r cosine vectors along which X has the largest norms, "l2" or "l1": d k log d at a fit, nothing stored."""

    every: int = 1
    carry: Carry = "restart"
    norm: Literal["l2", "l1"] = knob("l2", "dct_norm")
    kind: ClassVar[HeldKind] = "index"

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        lying = along_memory(X)  # (batch, k, d), where the transform is fastest
        S = dct(lying, overwrite=lying.data_ptr() != X.data_ptr())
        sums = square_sums(S.mT, layout) if self.norm == "l2" else absolute_sums(S.mT, layout)
        index = _seated(_largest(sums, rank), held, X.shape[-2])
        if len(S) == 1:
            low = S[0].index_select(1, index[0]).unsqueeze(0)
        else:
            low = S.gather(2, index.long().unsqueeze(1).expand(-1, S.shape[1], -1))
        return Fitted(index, low.mT.contiguous())

    def basis(self, held: Tensor, d: int, rank: int, like: Tensor, dtype: torch.dtype) -> Basis:
        return Columns(dct_columns(d, held, like.dtype), dtype)

    def faults(self) -> list[str]:
        wrong = self.norm not in ("l2", "l1")
        return super().faults() + ([f"dct_norm is 'l2' or 'l1'; got {self.norm!r}"] if wrong else [])


@dataclass(frozen=True)
class Gaussian(Subspaced):
    """Independent normal entries of variance 1/r (APOLLO), drawn anew at each fit; only their seed is stored.

    Not orthonormal: E‖Qᵀ x‖² = ‖x‖², and Q Qᵀ is d/r times too large on average to be a projection.
    """

    every: int = 200
    seed: int = knob(0, "subspace_seed")
    kind: ClassVar[HeldKind] = "seed"

    def fit(self, X: Tensor, held: Tensor | None, rank: int, seeds: list[int], layout: Layout) -> Fitted:
        return Fitted(torch.tensor([seed + self.seed for seed in seeds], dtype=torch.int64))

    def basis(self, held: Tensor, d: int, rank: int, like: Tensor, dtype: torch.dtype) -> Basis:
        return Columns(_normal(d, rank, held.tolist(), like) / math.sqrt(rank), dtype)

    def faults(self) -> list[str]:
        return super().faults() + number_fault("subspace_seed", self.seed, 0, 2**31)


SUBSPACES: dict[str, type] = {
    "svd": SVD,
    "randomized": Randomized,
    "power": Power,
    "rows": Rows,
    "dct": DCT,
    "gaussian": Gaussian,
}
"""By the names that ``subspace=`` takes."""


def along_memory(X: Tensor) -> Tensor:
    """Xᵀ (batch, k, d), contiguous: matrix by matrix, which torch transposes four times faster than a stack of them."""
    if X.mT.is_contiguous():
        return X.mT
    out = X.new_empty(X.shape[0], X.shape[2], X.shape[1])
    if X[0].numel() < 2**16:
        return out.copy_(X.mT)
    for i in range(len(X)):
        out[i].copy_(X[i].mT)
    return out


def span_step(X: Tensor, Q: Tensor, layout: Layout) -> Tensor:
    """One step of subspace iteration: an orthonormal basis of X Xᵀ Q."""
    if layout is WHOLE:
        return power_step(X.mT, Q)
    return warm_basis(layout.along(X @ (X.mT @ Q)), Q)


def carried(M: Tensor, unsigned: bool, old: Tensor, new: Tensor, carry: Carry, kind: HeldKind) -> Tensor:
    """The moments M (batch, r, k) of an old basis as those of a new one, see ``Subspaced.carry``; in place or anew."""
    if carry == "keep":
        return M
    if kind == "index":  # what stays kept its place
        return M.mul_((old == new).unsqueeze(-1))
    if carry == "restart":
        return torch.zeros_like(M)
    R = new.to(M.dtype).mT @ old.to(M.dtype)
    turned: Tensor = (R.square() if unsigned else R) @ M
    return turned


def _leading(A: Tensor, rank: int) -> Tensor:
    """The eigenvectors (batch, d, r) of the largest eigenvalues, largest first, signs fixed."""
    vectors: Tensor = torch.linalg.eigh(A.double()).eigenvectors[..., -rank:].flip(-1)
    biggest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, biggest) < 0, -1.0, 1.0)


def _largest(sums: Tensor, rank: int) -> Tensor:
    """(batch, r), rising."""
    return sums.topk(rank, dim=-1).indices.sort(dim=-1).values


def _seated(picked: Tensor, held: Tensor | None, d: int) -> Tensor:
    """The indices ``picked`` (batch, r) of [0, d), those that were held before in their old places: int32.

    Newcomers take the free places, both in rising order.
    """
    if held is None:
        return picked.int()
    old = held.long()
    among = torch.zeros(len(picked), d, dtype=torch.bool, device=picked.device).scatter_(1, picked, True)
    stays = among.gather(1, old)
    among.scatter_(1, old, False)
    newcomers = torch.where(among.gather(1, picked), picked, d).sort(dim=-1).values
    seat = (~stays).cumsum(-1).sub_(1).clamp_min_(0)
    return torch.where(stays, old, newcomers.gather(1, seat)).int()


def _normal(d: int, r: int, seeds: list[int], like: Tensor) -> Tensor:
    generator = torch.Generator(device=like.device)
    dtype = like.dtype
    draws = [
        torch.randn(d, r, generator=generator.manual_seed(seed), dtype=dtype, device=like.device) for seed in seeds
    ]
    return torch.stack(draws)


def _random_basis(X: Tensor, rank: int, seeds: list[int]) -> Tensor:
    return orthonormal(_normal(X.shape[-2], rank, seeds, X))
