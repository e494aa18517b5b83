"""Approximate orthogonalisation by a few quintic products, as Muon's updates need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.halves import product_dtype
from eckart.linalg.polar import QUINTIC

STRIPS = 4
SYMMETRIC_FROM = 512
"""Products known to be symmetric are computed in strips below the diagonal from this side on: 5/8 of the work."""

Coefficients = tuple[float, float, float]

GRAM_ASPECT = 2.0
"""Long over short side from which ``gram="auto"`` iterates on X Xᵀ."""
SEGMENTS = (2, 3)
"""Gram steps before X is formed anew: 2 at first, where small singular values are lifted most, then 3 each time.

Without it the error of a bfloat16 Gram matrix, relative to its largest eigenvalue, swamps the small ones: on a spectrum
of 1/i a 256 × 1024 matrix ends 33 times its own size away.
"""


def newton_schulz(
    X: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients | Sequence[Coefficients] = QUINTIC,
    gram: Literal["auto"] | bool = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Near U Vᵀ for X = U S Vᵀ (…, m, n): X/‖X‖_F through ``steps`` of σ ← a σ + b σ³ + c σ⁵. A new tensor like X.

    ``coefficients``: one (a, b, c), or one per step. The default lifts singular values into about [0.7, 1.2] and does
    not converge (:func:`polar_factor` does). Zero matrices stay zero. ``dtype``: what is computed in, by default X's;
    float32 for halves on a CPU without products of them.
    ``gram``: iterate on the s × s Gram matrix of the short side s, l being the long one: 4 s² l + 14 s³ multiply-adds
    for 5 steps instead of 10 s² l + 5 s³; the same polynomial, of the same accuracy since X is formed anew after 2
    steps. "auto": where l ≥ 2 s.

    Raises InputError for less than two dimensions, integers or complex numbers, and options out of range.
    """
    if X.ndim < 2 or not X.is_floating_point():
        raise InputError(
            f"newton_schulz: expected matrices of floating point numbers; got {tuple(X.shape)}, {X.dtype}."
        )
    if steps < 0 or gram not in ("auto", True, False):
        raise InputError(f"newton_schulz: expected steps ≥ 0, gram 'auto' or a bool; got {steps!r}, {gram!r}.")
    triples = _triples(coefficients, steps)
    tall = X.shape[-2] > X.shape[-1]
    wide = X.mT if tall else X
    work = wide.to(product_dtype(dtype or X.dtype, X.device))
    norm = torch.linalg.vector_norm(
        work, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(work.dtype, torch.float32)
    )
    Y = (work / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(work.dtype)
    short, long = Y.shape[-2:]
    Z = Y.reshape(-1, short, long)
    if gram is True or (gram == "auto" and long >= GRAM_ASPECT * short):
        first, rest = SEGMENTS
        Z = _gram_steps(Z, triples[:first])
        for start in range(first, steps, rest):
            Z = _gram_steps(Z, triples[start : start + rest])
    else:
        for a, b, c in triples:
            R = _symmetric(Z, Z.mT)
            Z = torch.baddbmm(Z, _symmetric(R, R).mul_(c).add_(R, alpha=b), Z, beta=a)
    Z = Z.reshape(Y.shape).to(X.dtype)
    found: Tensor = (Z.mT if tall else Z).contiguous()
    return found


def _gram_steps(X: Tensor, triples: Sequence[Coefficients]) -> Tensor:
    """The product of all P_k = a I + b R_k + c R_k² with X (batch, s, l), where R_1 = X Xᵀ and R_{k+1} = P_k R_k P_k.

    P − a I is what gets multiplied, and a times the other factor is added to the product, which keeps low bits.
    """
    if not triples:
        return X
    R = _symmetric(X, X.mT)
    Q: Tensor | None = None
    for k, (a, b, c) in enumerate(triples, 1):
        P = _symmetric(R, R).mul_(c).add_(R, alpha=b)
        if len(triples) == 1:
            return torch.baddbmm(X, P, X, beta=a)
        if k < len(triples):
            R = _symmetric(P, R).add_(R, alpha=a)
            R = _symmetric(R, P).add_(R, alpha=a)
        if Q is None:
            Q = P
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = _symmetric(P, Q).add_(Q, alpha=a)
    return Q @ X  # type: ignore[operator]


def _symmetric(A: Tensor, B: Tensor) -> Tensor:
    """A B (batch, s, s) where that is symmetric, as for A = Bᵀ and for polynomials of one symmetric matrix."""
    s = A.shape[-2]
    if s < SYMMETRIC_FROM:
        return A @ B
    C = A.new_empty(A.shape[0], s, s)
    width = -(-s // STRIPS)
    for start in range(0, s, width):
        end = min(start + width, s)
        C[:, start:, start:end] = A[:, start:] @ B[:, :, start:end]
        C[:, start:end, end:] = C[:, end:, start:end].mT
    return C


def _triples(coefficients: Coefficients | Sequence[Coefficients], steps: int) -> list[Coefficients]:
    given = list(coefficients)
    every = [given] * steps if all(isinstance(value, (int, float)) for value in given) else given
    if len(every) != steps or any(not isinstance(t, (tuple, list)) or len(t) != 3 for t in every):
        raise InputError(
            f"newton_schulz: expected three coefficients, or three for each of {steps} steps; got {given!r}."
        )
    return [(float(t[0]), float(t[1]), float(t[2])) for t in every]  # type: ignore[index]
