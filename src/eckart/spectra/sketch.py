"""The norms of a weight without its spectrum: what the quick look takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eckart.records import Finding, SiteKind
from eckart.spectra.values import as_matrices, frobenius, largest_entry, not_finite, over_slices

NAMES = ("frobenius", "spectral_norm", "stable_rank")
"""The findings of :func:`quick_norms`; the same names as those of :func:`eckart.spectra.spectrum`."""


def quick_norms(W: Tensor, *, kind: SiteKind | None = None, groups: int = 1, steps: int = 12) -> dict[str, Finding]:
    """‖W‖_F exactly, σ₁ and the stable rank by ``steps`` of Lanczos on WᵀW from one random vector, by name.

    σ₁ is approached from below; its uncertainty is the residual bound, within which some singular value lies. Where
    several lie close together at the top it may not be the largest, which a random start makes unlikely. Each step
    reads the weight twice: about 1/30 of the time of the whole spectrum at 4096 × 4096. Raises InputError for tensors
    that are no weights; None with a note for NaN and, for the stable rank, zeros.
    """
    matrices = as_matrices(W, "quick_norms", kind, groups)
    if flaw := not_finite(matrices):
        return {name: Finding(name=name, value=None, notes=(flaw,)) for name in NAMES}
    parts = [_one(matrix, steps) for matrix in matrices]
    return {name: over_slices(name, [part[name] for part in parts]) for name in NAMES}


def _one(matrix: Tensor, steps: int) -> dict[str, Finding]:
    scale = largest_entry(matrix)
    if scale == 0:
        zero = {name: Finding(name=name, value=0.0, uncertainty=0.0) for name in NAMES[:2]}
        return zero | {"stable_rank": Finding(name="stable_rank", value=None, notes=("all entries are zero",))}
    A = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32, copy=True).div_(scale)
    total = frobenius(A)
    top, width = _top(A, steps)
    note = (f"{steps} steps of Lanczos",)
    n = matrix.numel()
    ratio = (total / top) ** 2
    return {
        "frobenius": Finding(name="frobenius", value=total * scale, uncertainty=0.0, n=n),
        "spectral_norm": Finding(name="spectral_norm", value=top * scale, uncertainty=width * scale, n=n, notes=note),
        "stable_rank": Finding(name="stable_rank", value=ratio, uncertainty=2 * ratio * width / top, n=n, notes=note),
    }


def _top(A: Tensor, steps: int) -> tuple[float, float]:
    """Largest singular value and the width of the residual bound; Lanczos on AᵀA, all vectors kept orthogonal."""
    v = torch.randn(A.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(A)
    basis = [v / v.norm()]
    diagonal, beside = [], []
    for _ in range(min(steps, A.shape[1])):
        w = A.T @ (A @ basis[-1])
        diagonal.append(float(w @ basis[-1]))
        B = torch.stack(basis)
        for _ in range(2):  # once is not enough in float32
            w = w - B.T @ (B @ w)
        beside.append(float(w.norm()))
        if beside[-1] <= 1e-6 * abs(diagonal[0]):
            beside[-1] = 0.0
            break
        basis.append(w / beside[-1])
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, b in enumerate(beside[:-1]):
        T[i, i + 1] = T[i + 1, i] = b
    values, vectors = torch.linalg.eigh(T)
    top = math.sqrt(max(float(values[-1]), 0.0))
    residual = beside[-1] * abs(float(vectors[-1, -1]))
    return top, residual / (2 * top) if top else residual
