"""The truncation of a matrix that changes little from one call to the next, without a full SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError

OVERSAMPLE = 8
"""Fresh random columns beside the old basis: they see directions that it lacks, and let the rank grow by as many."""
_FEW = 4
"""Up to a quarter of the smaller side the iteration is several times cheaper than the exact way; above it is not."""
_SETTLED = 1e-3
"""Share of ‖A‖² that a further half-iteration may still gain before the exact way is taken instead."""


@dataclass(frozen=True)
class Truncation:
    """A ≈ U Uᵀ A, of the rank that keeps the energy asked for."""

    U: Tensor
    """(m, k), orthonormal columns, float32 or float64, on the device of A."""
    S: Tensor
    """(k,), the singular values kept, never rising."""
    matrix: Tensor
    """(m, n): U Uᵀ A."""
    exact: bool
    """Whether the Gram matrix was decomposed; False: subspace iteration from the old basis sufficed."""


def rank_for(squares: Tensor, energy: float, total: float) -> int | None:
    """The least k ≥ 1 with Σ_{i ≤ k} squares_i ≥ energy · total; None where all of them do not suffice."""
    kept = squares.double().cumsum(0)
    enough = int((kept < energy * total).sum()) + 1
    return enough if enough <= len(squares) else None


def truncate(A: Tensor, energy: float, U: Tensor | None = None, *, seed: int = 0) -> Truncation:
    """The truncation of A (m, n) to the fewest directions that keep the share ``energy``, in (0, 1), of ‖A‖²_F.

    ``U`` (m, k) is the basis of an earlier, similar matrix. From it, one block power step with
    OVERSAMPLE random columns, and Rayleigh–Ritz on the result. What the projection keeps is known exactly,
    ‖UᵀA‖² of ‖A‖² (Pythagoras), so the energy is kept for certain. That no smaller rank would do is checked, not
    proved: where a further half-iteration would gain more than a thousandth of ‖A‖², or the basis is too small for the
    energy, or k is above a quarter of m, the Gram matrix A Aᵀ is decomposed instead.

    Work is done in float64 for float64 and else in float32, which settles the energy to about 1e-6. Cost for
    m ≤ n (transpose A otherwise): about 5 m n k multiply-adds; the exact way m² n and an ``eigh`` of m³.
    Raises InputError for an energy outside of (0, 1), NotFiniteError for NaN or Inf.
    """
    if not 0 < energy < 1:
        raise InputError(f"energy is a share of the squared singular values, in (0, 1); got {energy!r}.")
    A = A if A.dtype == torch.float64 else A.float()
    total = float(A.square().sum(dtype=torch.float64))
    if not torch.isfinite(torch.tensor(total)):
        raise NotFiniteError("the matrix to be truncated holds NaN or Inf.")
    if total == 0:
        return Truncation(A.new_zeros(A.shape[0], 0), A.new_zeros(0), A.clone(), True)
    if U is not None and U.shape[1] > 0 and (U.shape[1] + OVERSAMPLE) * _FEW <= A.shape[0]:
        found = _from_basis(A, energy, total, U, seed)
        if found is not None:
            return found
    return _exact(A, energy, total)


def _exact(A: Tensor, energy: float, total: float) -> Truncation:
    squares, U = torch.linalg.eigh(A @ A.T)
    squares = squares.flip(0).clamp_min(0)
    k = rank_for(squares, energy, total) or len(squares)
    U = U.flip(1)[:, :k].contiguous()
    return Truncation(U, squares[:k].sqrt(), U @ (U.T @ A), True)


def _from_basis(A: Tensor, energy: float, total: float, U: Tensor, seed: int) -> Truncation | None:
    generator = torch.Generator(device=A.device).manual_seed(seed)
    omega = torch.randn(A.shape[1], OVERSAMPLE, dtype=A.dtype, device=A.device, generator=generator)
    Q = torch.linalg.qr(A @ torch.cat([A.T @ U.to(A.dtype), omega], dim=1)).Q
    B = Q.T @ A
    squares, E = torch.linalg.eigh(B @ B.T)
    squares, E = squares.flip(0).clamp_min(0), E.flip(1)
    k = rank_for(squares, energy, total)
    if k is None:
        return None
    E, S = E[:, :k], squares[:k].sqrt()
    SV = E.T @ B  # (k, n), the rows σ_i v_iᵀ
    # ‖A V‖² − ‖S‖² is what another half-iteration would keep on top.
    gain = float((A @ (SV / S[:, None]).T).square().sum(dtype=torch.float64)) - float(S.double().square().sum())
    if gain > _SETTLED * total:
        return None
    basis = Q @ E
    return Truncation(basis, S, basis @ SV, False)
