"""Truncated singular value decomposition with a stated choice of algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64, column_signs

Algorithm = Literal["full", "gram", "randomized", "krylov"]

_SMALL = 256
"""Up to this smaller side the full decomposition costs milliseconds, so nothing else is tried."""
_FEW = 8
"""Random projection is tried up to a rank of 1/8 of the smaller side; above, it costs as much as eigh."""
_TRUSTED = 1e-4
"""Smallest σ_k / σ_1 that the Gram matrix of float64 data may settle: relative error of σ_k about 2e-8."""


@dataclass(frozen=True)
class SVD:
    """A ≈ U diag(S) Vh, in float64 on the CPU. Signs: each column of U has a positive largest entry."""

    U: Tensor
    """(m, k), orthonormal columns."""
    S: Tensor
    """(k,), never rising."""
    Vh: Tensor
    """(k, n), orthonormal rows."""
    method: Algorithm
    """What was run in the end."""
    error_bound: float
    """(‖A − U diag(S) Vh‖_F − the least possible) / ‖A‖_F is at most this; 0 for the exact methods.
    :func:`eckart.linalg.leading_svd` has a bound of its own."""


def truncated_svd(
    A: Tensor,
    rank: int,
    *,
    method: Algorithm | Literal["auto"] = "auto",
    oversample: int = 10,
    power: int = 2,
    rtol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> SVD:
    """The leading ``rank`` singular triplets of A (m, n), 1 ≤ rank ≤ min(m, n).

    Whatever the dtype of A, the work is done in float64. ``method``:

    - ``full``: LAPACK's divide and conquer. Every singular value to eps · σ₁.
    - ``gram``: ``eigh`` of the Gram matrix of the smaller side, several times faster. It squares the
      condition: the relative error of σ_i is about eps · (σ₁/σ_i)², values below 1e-8 σ₁ are rounding.
    - ``randomized``: range of A Ω for ``rank + oversample`` normal vectors after ``power`` power iterations
      (Halko, Martinsson, Tropp, 2011). Values are never too large; ``error_bound`` says how far off.
    - ``auto``: ``full`` up to a smaller side of 256. Above, ``randomized`` where rank ≤ 1/8 of the smaller
      side and its bound comes out at most ``rtol``; else ``gram``, kept where σ_rank ≥ 1e-4 σ₁ (for data
      in float32 or less 1e-6 σ₁, below which their own rounding is larger than that of the Gram
      matrix); else ``full``. Only ``auto`` falls back; a method asked for by name is run as it is.

    The bound is a posteriori and certain: with B = QᵀA, the residual ‖A − QB‖² = ‖A‖² − ‖B‖² is exact
    (Pythagoras), and no approximation can gain more than that over the truncated B. It is tight for
    spectra that fall quickly and loose for flat ones. ``generator`` draws Ω; by default a new one, seed 0.

    Raises InputError for a rank out of range or an unknown method, NotFiniteError for NaN or Inf.
    """
    coarse = A.dtype != torch.float64
    A = as_float64(A, "truncated_svd", (2,))
    side = min(A.shape)
    if not 1 <= rank <= side:
        raise InputError(f"truncated_svd: rank is from 1 to min{tuple(A.shape)} = {side}; got {rank}.")
    if method not in ("auto", "full", "gram", "randomized"):
        raise InputError(f"truncated_svd: method is auto, full, gram or randomized; got {method!r}.")
    if oversample < 0 or power < 0:
        raise InputError(f"truncated_svd: oversample and power count from 0; got {oversample} and {power}.")
    if method == "full" or (method == "auto" and side <= _SMALL):
        return _full(A, rank)
    if method == "gram":
        return _gram(A, rank)
    if method == "randomized":
        return _randomized(A, rank, oversample, power, generator)
    if rank * _FEW <= side:
        found = _randomized(A, rank, oversample, power, generator)
        if found.error_bound <= rtol:
            return found
    found = _gram(A, rank)
    trusted = _TRUSTED * (1e-2 if coarse else 1.0)
    return found if found.S[-1] > trusted * found.S[0] else _full(A, rank)


def signed(U: Tensor, S: Tensor, Vh: Tensor, method: Algorithm, bound: float) -> SVD:
    """The decomposition with the sign of each triplet fixed."""
    signs = column_signs(U)
    return SVD(U * signs, S, signs[:, None] * Vh, method, bound)


def _full(A: Tensor, k: int) -> SVD:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return signed(U[:, :k], S[:k], Vh[:k], "full", 0.0)


def _gram(A: Tensor, k: int) -> SVD:
    """A Aᵀ = U S² Uᵀ and Vh = S⁻¹ UᵀA for m ≤ n; the transpose otherwise."""
    wide = A if A.shape[0] <= A.shape[1] else A.T
    _, U = torch.linalg.eigh(wide @ wide.T)
    U = U.flip(1)[:, :k]
    # QR instead of a division by S: rows stay orthonormal where S is zero or lost in rounding.
    V, R = torch.linalg.qr((U.T @ wide).T)
    S, Vh = R.diagonal().abs(), R.diagonal().sign().where(R.diagonal() != 0, 1.0)[:, None] * V.T
    S, order = S.sort(descending=True)
    U, Vh = U[:, order], Vh[order]
    return signed(U, S, Vh, "gram", 0.0) if wide is A else signed(Vh.T, S, U.T, "gram", 0.0)


def _randomized(A: Tensor, k: int, oversample: int, power: int, generator: torch.Generator | None) -> SVD:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    width = min(k + oversample, *A.shape)
    omega = torch.randn(A.shape[1], width, dtype=A.dtype, generator=generator)
    Q = torch.linalg.qr(A @ omega).Q
    for _ in range(power):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ A, full_matrices=False)
    total = float(A.square().sum())
    outside = max(total - float(S.square().sum()), 0.0)
    error = max(total - float(S[:k].square().sum()), 0.0)
    least = max(error - outside, 0.0)
    bound = (math.sqrt(error) - math.sqrt(least)) / math.sqrt(total) if total else 0.0
    return signed(Q @ U[:, :k], S[:k], Vh[:k], "randomized", bound)
