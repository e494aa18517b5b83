"""Square roots of positive semi-definite matrices that may be singular."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64


def relative_cutoff(n: int) -> float:
    """n · eps of float64: eigenvalues below this share of the largest one are rounding."""
    return max(n, 1) * torch.finfo(torch.float64).eps


def symmetric_root(S: Tensor, rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """S^½ and its pseudo-inverse S^-½.

    ``S`` is symmetric positive semi-definite (n, n), or (n,) for a diagonal, and so are the results.
    Eigenvalues at or below ``rtol`` times the largest one (default n · eps), and all negative ones, count as
    zero in both: centred outputs of a LayerNorm have exactly singular moments, and inverting
    what rounding left there would swamp everything else. One ``eigh``.

    Raises InputError for other shapes, NotFiniteError for NaN or Inf.
    """
    S = as_float64(S, "symmetric_root", (1, 2))
    if S.ndim == 2 and S.shape[0] != S.shape[1]:
        raise InputError(f"symmetric_root: expected a square matrix or a diagonal; got {tuple(S.shape)}.")
    rtol = relative_cutoff(S.shape[0]) if rtol is None else rtol
    if S.ndim == 1:
        return _scalar_roots(S, rtol)
    values, Q = torch.linalg.eigh(S)
    root, inverse = _scalar_roots(values, rtol)
    return (Q * root) @ Q.T, (Q * inverse) @ Q.T


def _scalar_roots(values: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    kept = values > rtol * values.abs().max() if values.numel() else values > 0
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    return root, inverse
