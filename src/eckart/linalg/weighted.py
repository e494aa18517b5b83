r"""Best low-rank approximation under two metrics, without an inverse of the larger one.

*Formula.* Minimise tr(G ΔW Σ ΔWᵀ) over ΔW = W − Ŵ, rank Ŵ ≤ k. Let m ≤ n (else transpose
everything and swap G and Σ) and G = RᵀR. With A = R W the objective is tr((A − RŴ) Σ (A − RŴ)ᵀ). Let

    K = A Σ Aᵀ = U Λ Uᵀ,  λ₁ ≥ λ₂ ≥ … ≥ λ_m    (one eigh of the smaller side)

Then Ŵ = R⁻¹ U_k U_kᵀ A is the minimiser, for every k at once, and Σ_{i>k} λ_i its exact objective: A Σ^½ has
the left singular vectors U, and projecting on U_k needs no root of Σ. So Σ is used as it is, whatever its
rank, and only G, on the smaller side, needs a root: Cholesky's where G is safely positive definite.

*Reference.* Eckart, Young, “The approximation of one matrix by another of lower rank”, 1936, under the
norms of G and Σ; Swift-SVD (arXiv 2604.01609), 2026, publishes the case G = I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64, column_signs
from eckart.linalg.roots import relative_cutoff

_SAFE = 1e-10
"""Cholesky's factor is used where (min l_ii / max l_ii)², an upper bound of 1/condition, exceeds this."""


@dataclass(frozen=True)
class WeightedFactors:
    """Every rank at once: Ŵ_k is ``left[:, :k] @ right[:k]``. float64 on the CPU, r = min(m, n)."""

    left: Tensor
    """(m, r), of full column rank."""
    right: Tensor
    """(r, n)."""
    errors: Tensor
    """(r + 1,): tr(G ΔW Σ ΔWᵀ) at rank 0 … r; never rising, errors[r] is 0."""


def weighted_factors(W: Tensor, second: Tensor | None = None, gradient: Tensor | None = None) -> WeightedFactors:
    """Minimise tr(G ΔW Σ ΔWᵀ) at every rank, for W (m, n).

    ``second`` is Σ and ``gradient`` is G: positive semi-definite (n, n) and (m, m), or (n,) and (m,) for
    diagonals, or None for the identity. Diagonals are never made into matrices.

    Directions to which the smaller side's metric gives no weight (eigenvalue at most m · eps of the largest)
    cost nothing, so they come last, in order of their plain energy: at smaller ranks Ŵ is zero there,
    and at full rank Ŵ is W whatever the metrics are. Zero matrices and single rows or columns are fine.

    Cost: the products A Σ and (A Σ) Aᵀ, one ``eigh`` of size min(m, n), one product for each factor, and a
    root of the smaller side's metric if it has one (a second ``eigh`` where that is singular).

    Raises InputError for shapes that do not fit, NotFiniteError for NaN or Inf.
    """
    W = as_float64(W, "weight", (2,))
    m, n = W.shape
    if not W.numel():
        raise InputError(f"weighted_factors: expected a matrix with entries; got shape ({m}, {n}).")
    sigma = _metric(second, n, "second")
    G = _metric(gradient, m, "gradient")
    if m <= n:
        return _project(W, sigma, G)
    swapped = _project(W.T.contiguous(), G, sigma)
    return WeightedFactors(swapped.right.T, swapped.left.T, swapped.errors)


def _metric(S: Tensor | None, n: int, name: str) -> Tensor | None:
    if S is None:
        return None
    S = as_float64(S, name, (1, 2))
    if any(size != n for size in S.shape):
        raise InputError(f"{name}: expected ({n}, {n}) or ({n},) to fit the weight; got {tuple(S.shape)}.")
    return S


def _project(W: Tensor, sigma: Tensor | None, G: Tensor | None) -> WeightedFactors:
    """The module's formula for m ≤ n."""
    A, inverse, outside = _rooted(W, G)
    values, U = torch.linalg.eigh(_times(A, sigma) @ A.T)
    values, U = values.flip(0).clamp(min=0.0), U.flip(1)
    U = U * column_signs(U)
    left, right = inverse(U), U.T @ A
    if outside is not None:
        rows = outside.T @ W
        _, V = torch.linalg.eigh(rows @ rows.T)
        V = V.flip(1)
        left, right = torch.cat([left, outside @ V], dim=1), torch.cat([right, V.T @ rows])
    errors = W.new_zeros(W.shape[0] + 1)
    errors[: values.numel()] = values.flip(0).cumsum(0).flip(0)
    return WeightedFactors(left, right, errors)


def _times(A: Tensor, sigma: Tensor | None) -> Tensor:
    """A Σ."""
    if sigma is None:
        return A
    return A * sigma.clamp(min=0.0) if sigma.ndim == 1 else A @ sigma


def _rooted(W: Tensor, G: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor | None]:
    """R W, the map U ↦ R⁻¹ U, and an orthonormal basis of the directions without weight, for G = RᵀR."""
    m = W.shape[0]
    if G is None:
        return W, lambda U: U, None
    if G.ndim == 2:
        L, info = torch.linalg.cholesky_ex(G)
        pivots = L.diagonal()
        if not info and (pivots.min() / pivots.max()) ** 2 > _SAFE:
            return L.T @ W, lambda U: torch.linalg.solve_triangular(L.T, U, upper=True), None
        values, Q = torch.linalg.eigh(G)
    else:
        values, Q = G, None
    inside = values > relative_cutoff(m) * values.abs().max()
    root = values[inside].sqrt()[:, None]
    if Q is None:
        if inside.all():
            return root * W, lambda U: U / root, None
        Q = torch.eye(m, dtype=W.dtype)
    basis, outside = Q[:, inside], Q[:, ~inside]
    return root * (basis.T @ W), lambda U: basis @ (U / root), outside if outside.shape[1] else None
