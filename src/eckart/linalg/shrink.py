"""Shrinkage of a second moment towards its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError


def shrink_to_diagonal(S: Tensor, rho: float) -> Tensor:
    """(1 − ρ) S + ρ diag(S) for S (n, n) and ρ in [0, 1]; a diagonal (n,) comes back as it is.

    Off-diagonal entries of a moment of few tokens are mostly noise; the diagonal is not.
    """
    if not 0.0 <= rho <= 1.0:
        raise InputError(f"shrink_to_diagonal: rho is a share in [0, 1]; got {rho!r}.")
    if S.ndim == 1:
        return S
    if S.ndim != 2 or S.shape[0] != S.shape[1]:
        raise InputError(f"shrink_to_diagonal: expected a square matrix or a diagonal; got {tuple(S.shape)}.")
    shrunk = (1.0 - rho) * S
    return torch.diagonal_scatter(shrunk, S.diagonal())
