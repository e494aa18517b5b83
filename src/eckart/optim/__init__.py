"""Optimizers that use low-dimensional and orthogonal structure."""

from eckart.optim.table import OPTIMIZERS

__all__ = [
    "OPTIMIZERS",
]
