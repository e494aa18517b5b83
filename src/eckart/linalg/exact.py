"""The precision that every decomposition works in."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError


def as_float64(A: Tensor, name: str, dims: tuple[int, ...]) -> Tensor:
    """``A`` in float64 on the CPU, detached; the same memory where it is so already.

    Raises InputError where the number of dimensions is not among ``dims``, NotFiniteError where an
    entry is NaN or Inf.
    """
    if A.ndim not in dims or A.is_complex():
        wanted = " or ".join(f"{d}-D" for d in dims)
        raise InputError(f"{name}: expected a real {wanted} tensor; got shape {tuple(A.shape)}, {A.dtype}.")
    A = A.detach().to("cpu", torch.float64)
    # A sum is NaN or Inf where any entry is; only then are the entries looked at one by one.
    if not A.sum().isfinite() and not (finite := A.isfinite()).all():
        raise NotFiniteError(f"{name}: {int((~finite).sum())} of {A.numel()} entries are NaN or Inf.")
    return A


def column_signs(U: Tensor) -> Tensor:
    """(k,) of ±1 that make the entry of largest magnitude in each column of U (m, k) positive."""
    if U.numel() == 0:
        return U.new_ones(U.shape[1])
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
