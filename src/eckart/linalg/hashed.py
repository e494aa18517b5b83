"""Random numbers that are a function of a seed: the same on every machine, device and version of torch.

torch.Generator promises no stream across versions and devices, so what a checkpoint is to rebuild from a seed
cannot come from it. The numbers here are those of SplitMix64 (G. Steele, D. Lea, C. Flood, “Fast Splittable
Pseudorandom Number Generators”, 2014): integer arithmetic alone, on the CPU, no state, so that no other
random stream is touched.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eckart.errors import InputError

GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ / golden ratio, the step of SplitMix64."""
LARGEST_SEED = 2**63 - 1
"""A seed has to fit into an int64 tensor, as which it is saved."""


def check_seed(seed: object, what: str) -> int:
    """``seed`` where it is an int in [0, 2⁶³); InputError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{what}: the seed is an int in [0, 2**63); got {seed!r}.")
    return seed


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed: int, count: int, stream: int = 0) -> NDArray[np.uint64]:
    """(count,) uint64, uniform; ``stream`` tells independent sequences of one seed apart. 8 · count bytes."""
    start = _mix(np.array([seed], dtype=np.uint64) + _mix(np.array([stream + 1], dtype=np.uint64)))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return _mix(start + steps)


def permutation(seed: int, n: int, stream: int = 0) -> Tensor:
    """(n,) int64: 0 … n − 1 in random order, by sorting n hashes. O(n log n)."""
    order: NDArray[Any] = np.argsort(random_bits(seed, n, stream), kind="stable")
    return torch.from_numpy(order)


def gaussians(seed: int, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Standard normal numbers, float64, by Box and Muller; equal across machines up to the last bits of log and cos."""
    count = math.prod(shape)
    uniform = (random_bits(seed, 2 * count, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[:count]))
    return torch.from_numpy(radius * np.cos(2 * math.pi * uniform[count:])).reshape(shape)
