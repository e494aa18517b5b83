"""The singular value decomposition of a product of two thin matrices, without forming it."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64
from eckart.linalg.svd import SVD, signed


def product_svd(B: Tensor, A: Tensor, rank: int | None = None) -> SVD:
    """The leading ``rank`` singular triplets of B A for B (m, k) and A (k, n); min(m, k, n) of them by default.

    With B = Q_B R_B and Aᵀ = Q_A R_A, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, and the decomposition is that of a k × k matrix
    between orthonormal ones: O((m + n) k² + k³) instead of O(m n min(m, n)). Exact to rounding; float64 on the CPU.

    Raises InputError for shapes that do not fit and a rank out of range, NotFiniteError for NaN or Inf.
    """
    B, A = as_float64(B, "product_svd: B", (2,)), as_float64(A, "product_svd: A", (2,))
    if B.shape[1] != A.shape[0]:
        raise InputError(f"product_svd: expected B (m, k) and A (k, n); got {tuple(B.shape)} and {tuple(A.shape)}.")
    most = min(*B.shape, A.shape[1])
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise InputError(f"product_svd: rank is from 1 to {most}; got {rank}.")
    (Q, R), (P, T) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)
    return signed(Q @ U[:, :rank], S[:rank], Vh[:rank] @ P.T, "full", 0.0)
