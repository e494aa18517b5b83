"""Following the leading directions of a slowly changing matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.halves import product_dtype

HOLD = 1e-6
"""Share of the old directions that is mixed in: it decides only where the matrix says nothing, in its null space."""


def power_step(G: Tensor, Q: Tensor) -> Tensor:
    """An orthonormal basis (…, n, r) of Gᵀ G Q for G (…, m, n): one warm step of subspace iteration from Q (…, n, r).

    Columns keep their order and sign (Q comes back where it spans singular vectors, in falling order), so that moments
    kept along them stay meaningful. Where G vanishes, on all of Q or on a part of it, the old directions stay. The
    products run in G's dtype and the decomposition in at least float32; the result has Q's dtype. 2 m n r
    multiply-adds and the QR of an n × r matrix. Raises InputError where shapes do not fit or r > n.
    """
    if G.ndim < 2 or Q.ndim != G.ndim or Q.shape[-2] != G.shape[-1] or Q.shape[-1] > Q.shape[-2]:
        raise InputError(
            f"power_step: expected G (…, m, n) and Q (…, n, r) with r ≤ n; got {tuple(G.shape)}, {tuple(Q.shape)}."
        )
    G = G.to(product_dtype(G.dtype, G.device))
    return warm_basis(G.mT @ (G @ Q.to(G.dtype)), Q)


def warm_basis(Y: Tensor, Q: Tensor) -> Tensor:
    """The end of :func:`power_step`: from Y = Gᵀ G Q to an orthonormal basis, in Q's dtype."""
    Y = Y.to(torch.promote_types(Q.dtype, torch.float32))
    size = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    Y = torch.where(size > 0, Y / size, 0.0) + HOLD * Q
    return orthonormal(Y).to(Q.dtype)


def orthonormal(Y: Tensor) -> Tensor:
    """The Q of Y = Q R (…, n, r) with the diagonal of R positive, which makes it unique and continuous in Y."""
    Q, R = torch.linalg.qr(Y)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    signed: Tensor = Q * sign.unsqueeze(-2)
    return signed
