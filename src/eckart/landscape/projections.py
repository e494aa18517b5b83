r"""Random maps P from d numbers to D parameters: dense, Fastfood and one-hot.

Each is a module without parameters whose ``forward`` takes θ_d (d,) to P θ_d (D,); autograd gives the transpose. The
columns of P have norm 1, so that a step of length ε in θ_d moves the parameters by about ε, whatever D is. All numbers
are a function of ``seed`` alone (:mod:`eckart.linalg.hashed`), equal on every machine: nothing of P has to be saved.

| | P | memory | per use | columns |
|---|---|---|---|---|
| dense | Gaussian, columns normalised | D d | D d | unit, nearly orthogonal |
| Fastfood | first d columns and D rows of H G Π H B / √(D Σ g²) | O(D) | O(D log D) | nearly unit and orthogonal |
| one-hot | ±1/√n_j where parameter i belongs to coordinate j | O(D) | O(D) | orthonormal, to rounding |

H is the Walsh-Hadamard matrix of size L, the least power of two ≥ D, B random signs, Π a permutation, G a diagonal of
standard normal numbers g. Why √(D Σ g²): H B e_j has entries ±1, so G Π H B e_j has squared norm Σ g², and H multiplies
it by L; D of the L rows remain, which leaves D Σ g² on average, and exactly that for D = L. Some accounts leave out
that last factor D/L, which makes the columns too short by up to √2; others draw one map per tensor with its own
normalisation, which makes each column √(number of tensors) long.

The one-hot map deals the parameters out like cards: a random permutation, then one coordinate after the other, so that
each coordinate moves ⌊D/d⌋ or ⌈D/d⌉ parameters and none is empty, as it may be where every parameter draws its own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from eckart.errors import InputError, problems, unknown
from eckart.linalg import walsh_hadamard
from eckart.linalg.hashed import check_seed, gaussians, permutation, random_bits

ProjectionKind = Literal["dense", "fastfood", "one-hot"]

SIGNS, ORDER, NORMALS = 0, 1, 2
"""Streams of the seed."""


def _signs(seed: int, count: int) -> Tensor:
    """(count,) float64 of ±1."""
    return torch.from_numpy((random_bits(seed, count, SIGNS) & 1).astype("float64") * 2 - 1)


class Projection(nn.Module):
    """P (parameters, dimension), with 1 ≤ dimension ≤ parameters; raises InputError otherwise.

    Built in float64; ``.to(dtype)`` makes it smaller.
    """

    def __init__(self, parameters: int, dimension: int, *, seed: int = 0) -> None:
        super().__init__()
        what = type(self).__name__
        wrong = []
        for name, value in (("parameters", parameters), ("dimension", dimension)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                wrong.append(f"{name} is an int of at least 1; got {value!r}")
        if not wrong and dimension > parameters:
            wrong.append(f"dimension is at most the number of parameters, {parameters}; got {dimension}")
        if wrong:
            raise InputError(problems(what, wrong))
        self.parameters_out = parameters
        self.dimension = dimension
        self.seed = check_seed(seed, what)

    def dense(self) -> Tensor:
        """P as a matrix (parameters, dimension), column by column; for small sizes."""
        some = next(buffer for buffer in self.buffers() if buffer.is_floating_point())
        units = torch.eye(self.dimension, dtype=some.dtype, device=some.device)
        return torch.stack([self(unit) for unit in units], dim=1)

    def extra_repr(self) -> str:
        return f"parameters={self.parameters_out}, dimension={self.dimension}, seed={self.seed}"


class DenseProjection(Projection):
    """Gaussian with normalised columns; memory and time parameters × dimension."""

    matrix: Tensor

    def __init__(self, parameters: int, dimension: int, *, seed: int = 0) -> None:
        super().__init__(parameters, dimension, seed=seed)
        matrix = gaussians(seed, (parameters, dimension), NORMALS)
        matrix /= torch.linalg.vector_norm(matrix, dim=0)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        return self.matrix.to(theta.dtype) @ theta


class FastfoodProjection(Projection):
    """H G Π H B, cut to shape and scaled to unit columns; O(parameters) memory, O(parameters log parameters) time."""

    signs: Tensor
    order: Tensor
    normals: Tensor

    def __init__(self, parameters: int, dimension: int, *, seed: int = 0) -> None:
        super().__init__(parameters, dimension, seed=seed)
        self.padded = 1 << (parameters - 1).bit_length()
        """L, the size of the Walsh-Hadamard transform."""
        normals = gaussians(seed, (self.padded,), NORMALS)
        normals /= math.sqrt(parameters * float(normals.square().sum()))
        self.register_buffer("signs", _signs(seed, dimension), persistent=False)
        self.register_buffer("order", permutation(seed, self.padded, ORDER), persistent=False)
        self.register_buffer("normals", normals, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        x = nn.functional.pad(theta * self.signs.to(theta.dtype), (0, self.padded - self.dimension))
        x = walsh_hadamard(x)[self.order] * self.normals.to(theta.dtype)
        return walsh_hadamard(x)[: self.parameters_out]


class OneHotProjection(Projection):
    """Every parameter follows one coordinate, with a sign; PᵀP = I, O(parameters) memory and time."""

    owner: Tensor
    signs: Tensor

    def __init__(self, parameters: int, dimension: int, *, seed: int = 0) -> None:
        super().__init__(parameters, dimension, seed=seed)
        owner = permutation(seed, parameters, ORDER) % dimension
        counts = owner.bincount(minlength=dimension).double()
        weights = _signs(seed, parameters) / counts.sqrt()[owner]
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("signs", weights, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        return theta[self.owner] * self.signs.to(theta.dtype)


PROJECTIONS: dict[ProjectionKind, type[Projection]] = {
    "dense": DenseProjection,
    "fastfood": FastfoodProjection,
    "one-hot": OneHotProjection,
}


def projection(kind: ProjectionKind, parameters: int, dimension: int, *, seed: int = 0) -> Projection:
    """The named map from ``dimension`` numbers to ``parameters``. Raises InputError for other names and sizes."""
    if kind not in PROJECTIONS:
        raise InputError(unknown("projection", str(kind), PROJECTIONS))
    return PROJECTIONS[kind](parameters, dimension, seed=seed)
