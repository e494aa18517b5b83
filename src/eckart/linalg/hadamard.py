"""The Walsh-Hadamard transform without its matrix."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor

from eckart.errors import InputError

RADIX = 64
"""Six of the doublings go into one product with H of this size: log₆₄ n passes over memory instead of log₂ n."""


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, whose size n is a power of two, for H of ±1 in Sylvester's order: H H = n I.

    H₁ = [1], H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]], so H of size a b is H_a ⊗ H_b, whose factors are applied one by one. O(n)
    memory, O(n log n) time; keeps dtype and device, and autograd runs through it (the gradient is H again). Raises
    InputError for another size or integers.
    """
    n = x.shape[-1] if x.ndim else 0
    if n < 1 or n & (n - 1):
        raise InputError(f"walsh_hadamard: expected a last dimension that is a power of two; got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"walsh_hadamard: expected floating point numbers; got {x.dtype}.")
    shape, done = x.shape, 1
    while done < n:
        radix = min(RADIX, n // done)
        H = torch.from_numpy(_factor(radix)).to(x)
        x = x.reshape(-1, radix) @ H if done == 1 else H @ x.reshape(-1, radix, done)
        done *= radix
    return x.reshape(shape)


@functools.cache
def _factor(size: int) -> NDArray[np.int64]:
    """An array: a tensor that is kept would remember the mode in which it was made."""
    found: NDArray[np.int64] = hadamard(size)
    return found
