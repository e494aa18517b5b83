"""The leading singular triplets of a large matrix from a block Krylov space, checked before they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg.exact import as_float64
from eckart.linalg.svd import SVD, signed, truncated_svd

_CHECKS = (5, 7, 9, 12, 16, 21, 28)
"""Numbers of block steps after which the residuals are looked at."""
_CHEAP = 1024
"""Up to this side a look costs as much as two steps, and comes first after the second number of them."""
_MULTIPLE = 16
"""Blocks of a multiple of this width keep the matrix products at full speed; 18 columns cost half more than 16."""
_SHARE = 0.6
"""A basis larger than this share of the smaller side costs as much as the exact decomposition."""


def leading_svd(A: Tensor, rank: int, *, seed: int = 0, tolerance: float = 0.05) -> SVD:
    """The leading ``rank`` singular triplets of A (m, n), 1 ≤ rank ≤ min(m, n), for initialising, not for rounding.

    A block Krylov space of AᵀA (of A Aᵀ where m < n), from ``rank`` normal vectors (rounded up to a multiple of 16)
    drawn by ``seed``: span{Ω, AᵀA Ω, (AᵀA)² Ω, …}, each block made orthogonal twice to those before it,
    and the Rayleigh-Ritz triplets of A in it. It keeps what a power iteration throws away, so that it
    gets by with a third of the passes over A where a spectrum is flat. Runs in float32 for data of float32 or less, on
    the device of A.

    The check: for AᵀA V = V diag(σ²) + R, the norms ‖R_i‖ come out of the last orthonormalisation at no cost, and each
    σ_i² is within ‖R_i‖ of a squared singular value of A (Weyl), and for one apart from the others within about the
    square of that. Accepted where all ‖R_i‖ ≤ ``tolerance`` · σ_i²; else more steps, up to a basis of 0.6 of the
    smaller side; else the exact decomposition (:func:`eckart.linalg.truncated_svd`). ``error_bound`` is max ‖R_i‖ /
    σ_i², 0 for exact ones; ``method`` says what ran. That no larger σ was missed holds almost surely, by the draw of Ω.

    Equal arguments give equal results on one machine, whatever the state of torch's generators.
    Raises InputError for a rank out of range, NotFiniteError for NaN or Inf. Cost: 4 m n rank per step.

    Source: C. Musco, C. Musco, “Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition”, 2015.
    """
    if A.ndim != 2 or not A.is_floating_point():
        raise InputError(f"leading_svd: expected a real matrix; got shape {tuple(A.shape)}, {A.dtype}.")
    side = min(A.shape)
    if not 1 <= rank <= side:
        raise InputError(f"leading_svd: rank is from 1 to min{tuple(A.shape)} = {side}; got {rank}.")
    block = _MULTIPLE * -(-rank // _MULTIPLE)
    if block * _CHECKS[0] <= _SHARE * side:
        found = _krylov(A.detach(), rank, block, seed, tolerance)
        if found is not None:
            return found
    if not A.sum().isfinite() and not (finite := A.isfinite()).all():
        raise NotFiniteError(f"leading_svd: {int((~finite).sum())} of {A.numel()} entries are NaN or Inf.")
    return truncated_svd(A, rank, method="full" if side <= 512 or A.dtype == torch.float64 else "auto", rtol=0.0)


def _krylov(A: Tensor, rank: int, block: int, seed: int, tolerance: float) -> SVD | None:
    """None where the residuals stay too large, A has fewer directions than it should, or its products overflow."""
    side = min(A.shape)
    work = torch.float64 if A.dtype == torch.float64 else torch.float32
    wide = A.shape[0] < A.shape[1]
    A = A.to(work)
    if not A.is_contiguous() and not A.mT.is_contiguous():
        A = A.contiguous()
    tall = A.T if wide else A
    steps = min(_CHECKS[-1], int(_SHARE * side / block))
    looks = _CHECKS[1:] if side <= _CHEAP and steps >= _CHECKS[1] else _CHECKS
    # Vectors are rows: so each product with A runs at full speed in either direction, without a transposed copy of A,
    # and each block is in the layout that its QR wants.
    basis = tall.new_empty(block * steps, side)
    gram = tall.new_empty(block * steps, block * steps)
    omega = torch.randn(side, block, generator=torch.Generator().manual_seed(seed), dtype=work).to(tall.device)
    Q = torch.linalg.qr(omega).Q.T
    for step in range(1, steps + 1):
        new, end = slice(block * (step - 1), block * step), block * step
        basis[new] = Q
        V = basis[:end]
        Z = (Q @ tall.T) @ tall
        if step == 1 and not Z.sum().isfinite():
            return None
        # V AᵀA Qᵀ is at once what the block has in the basis and the last column of the projected matrix.
        C = Z @ V.T
        gram[new, :end] = C
        P, R = torch.linalg.qr(Z.addmm_(C, V, alpha=-1).T)
        if step in looks:
            values, Y = torch.linalg.eigh(gram[:end, :end])  # which reads the lower triangle alone
            sigma, Y = values[-rank:].flip(0).clamp(min=0.0).sqrt(), Y[:, -rank:].flip(1)
            if not sigma[-1] > torch.finfo(work).eps * sigma[0]:
                return None
            bound = float(((R @ Y[-block:]).norm(dim=0) / sigma.square()).max())
            if bound <= tolerance:
                X = (Y.T @ V).T
                return _ritz(tall @ X, X, wide, bound)
        again = P.T @ V.T
        Q = torch.addmm(P.T, again, V, alpha=-1)
        # What is taken out is rounding, of size δ, and leaves the rows orthonormal up to δ²; else they are made so.
        if float(again.square().sum()) > torch.finfo(work).eps:
            Q = torch.linalg.qr(Q.T).Q.T
    return None


def _ritz(AV: Tensor, V: Tensor, wide: bool, bound: float) -> SVD:
    """Triplets with orthonormal U from A V (m, k), for orthonormal V (n, k)."""
    left = as_float64(AV, "leading_svd", (2,))
    V, flips = torch.linalg.qr(as_float64(V, "leading_svd", (2,)))  # orthonormal to float64, not only to float32
    Q, R = torch.linalg.qr(left)
    W, S, Zh = torch.linalg.svd(R)
    U, Vh = Q @ W, (Zh * flips.diagonal().sign()) @ V.T
    return signed(Vh.T, S, U.T, "krylov", bound) if wide else signed(U, S, Vh, "krylov", bound)
