"""Rows that span all others."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64


def pivot_rows(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k rows of ``left`` (m, k) and the matrix that writes the other rows in terms of them.

    Returns ``kept`` (k,) and ``rest`` (m − k,), both int64 and ascending, and ``T`` (m − k, k) in
    float64 with ``left[rest] = T @ left[kept]``. The same T holds for every ``left @ right``. Rows
    come from a QR decomposition with column pivoting of an orthonormal basis of left's range, which
    keeps the entries of T small (in practice below 2). Where ``left`` has rank p < k, k − p columns of T are
    zero. O(m k²).

    Raises InputError unless 1 ≤ k ≤ m, NotFiniteError for NaN or Inf.
    """
    left = as_float64(left, "pivot_rows", (2,))
    m, k = left.shape
    if not 1 <= k <= m:
        raise InputError(f"pivot_rows: expected (m, k) with 1 ≤ k ≤ m; got ({m}, {k}).")
    basis, triangle = torch.linalg.qr(left)
    diagonal = triangle.diagonal().abs()
    if diagonal.min() <= m * torch.finfo(torch.float64).eps * diagonal.max():
        basis = left  # not of full rank: Q holds directions that left lacks
    R, order = scipy.linalg.qr(basis.T.numpy(), mode="r", pivoting=True, check_finite=False)
    R, order = torch.from_numpy(R), torch.from_numpy(order).long()
    pivots = R.diagonal().abs()
    p = int((pivots > m * torch.finfo(torch.float64).eps * pivots[0]).sum())
    T = left.new_zeros(m - k, k)
    T[:, :p] = torch.linalg.solve_triangular(R[:p, :p], R[:p, k:], upper=True).T
    kept, kept_order = order[:k].sort()
    rest, rest_order = order[k:].sort()
    return kept, rest, T[rest_order][:, kept_order]
