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
    float64 with ``left[rest] = T @ left[kept]``. The same T holds for every ``left @ right``. The rows are
    those that a QR decomposition with column pivoting picks from Qᵀ, where left = Q R: an orthonormal basis,
    so that neither the scale of columns nor a lack of rank matters, and the entries of T stay small (in
    practice below 2). O(m k²).

    Raises InputError unless 1 ≤ k ≤ m, NotFiniteError for NaN or Inf.
    """
    left = as_float64(left, "pivot_rows", (2,))
    m, k = left.shape
    if not 1 <= k <= m:
        raise InputError(f"pivot_rows: expected (m, k) with 1 ≤ k ≤ m; got ({m}, {k}).")
    Q, _ = torch.linalg.qr(left)
    triangle, order = scipy.linalg.qr(Q.T.numpy(), mode="r", pivoting=True, check_finite=False)
    R, order = torch.from_numpy(triangle), torch.from_numpy(order).long()
    T = torch.linalg.solve_triangular(R[:, :k], R[:, k:], upper=True).T
    kept, kept_order = order[:k].sort()
    rest, rest_order = order[k:].sort()
    return kept, rest, T[rest_order][:, kept_order]
