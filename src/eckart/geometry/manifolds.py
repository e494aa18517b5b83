"""Samples of manifolds whose dimension is known, for claims, tests and benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embed(points: Tensor, features: int, seed: int) -> Tensor:
    """points (n, D) turned into ``features`` ≥ D dimensions by a random isometry."""
    G = torch.randn(features, points.shape[1], generator=_generator(seed), dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(G).Q
    return points @ basis.T


def cube(n: int, dimension: int, features: int, *, seed: int) -> Tensor:
    """n uniform points of [0, 1]^dimension, in ``features`` dimensions."""
    points = torch.rand(n, dimension, generator=_generator(seed), dtype=torch.float64)
    return embed(points, features, seed + 1)


def gaussian(n: int, dimension: int, features: int, *, seed: int) -> Tensor:
    """n standard Gaussian points of ``dimension``, in ``features`` dimensions."""
    return embed(torch.randn(n, dimension, generator=_generator(seed), dtype=torch.float64), features, seed + 1)


def sphere(n: int, dimension: int, features: int, *, seed: int) -> Tensor:
    """n uniform points of the unit sphere of ``dimension``, which spans ``dimension`` + 1, in ``features``."""
    points = torch.randn(n, dimension + 1, generator=_generator(seed), dtype=torch.float64)
    return embed(points / points.norm(dim=1, keepdim=True), features, seed + 1)


def swiss_roll(n: int, features: int, *, seed: int) -> Tensor:
    """n points of a rolled-up strip, dimension 2, in ``features`` ≥ 3: angle 1.5π to 4.5π, width 21."""
    u, v = torch.rand(2, n, generator=_generator(seed), dtype=torch.float64)
    angle = 1.5 * math.pi * (1 + 2 * u)
    return embed(torch.stack([angle * angle.cos(), 21 * v, angle * angle.sin()], 1), features, seed + 1)


def noisy(points: Tensor, std: float, *, seed: int) -> Tensor:
    """The points with independent Gaussian noise of ``std`` in every feature."""
    return points + std * torch.randn(points.shape, generator=_generator(seed), dtype=torch.float64)
