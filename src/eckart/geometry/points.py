"""What the measures of data take: a matrix of points, checked once and cast to float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError

NORMAL_95 = 1.959964
"""Half width of a 95 % interval in standard errors, for a Gaussian error."""


def as_points(X: Tensor, name: str) -> Tensor:
    """X (n, D), n ≥ 1 and D ≥ 1, as a float64 tensor on the CPU, without a graph.

    Integers, booleans and half precision are cast: every one of their values is a float64. ``name`` stands in front
    of the messages. Raises InputError for what is no dense real matrix with at least one row and column,
    NotFiniteError for NaN and Inf.
    """
    if not isinstance(X, Tensor):
        raise InputError(f"{name}: expected a torch.Tensor (n, D); got {type(X).__name__}. Use torch.as_tensor(…).")
    if X.layout != torch.strided or X.is_quantized:
        raise InputError(
            f"{name}: expected a dense tensor; got {X.layout}, {X.dtype}. Use .to_dense() or .dequantize()."
        )
    if X.is_complex():
        raise InputError(f"{name}: expected real numbers; got {X.dtype}. Use torch.view_as_real(X).flatten(1).")
    if X.ndim != 2:
        remedy = "X[:, None] makes n points on a line of it" if X.ndim == 1 else "X.flatten(1) keeps one point a row"
        remedy = "a single number has no shape" if X.ndim == 0 else remedy
        raise InputError(f"{name}: expected a matrix (n, D), one point a row; got shape {tuple(X.shape)}. {remedy}.")
    if 0 in X.shape:
        raise InputError(f"{name}: expected at least one row and one column; got shape {tuple(X.shape)}.")
    points = X.detach().to(device="cpu", dtype=torch.float64)
    finite = points.isfinite().all(1)
    if not bool(finite.all()):
        broken = (~finite).nonzero().flatten()
        raise NotFiniteError(
            f"{name}: NaN or Inf in {broken.numel()} of {X.shape[0]} rows, the first is row {int(broken[0])}. "
            "Drop or repair them: X[X.isfinite().all(1)]."
        )
    return points


def distinct(points: Tensor) -> Tensor:
    """The rows of ``points`` (n, D) without repetitions, in the order of their first appearance."""
    rows, group = torch.unique(points + 0.0, dim=0, return_inverse=True)  # −0.0 + 0.0 = 0.0
    if rows.shape[0] == points.shape[0]:
        return points
    first = torch.full((rows.shape[0],), points.shape[0])
    first.scatter_reduce_(0, group, torch.arange(points.shape[0]), "amin")
    return points[first.sort().values]


@dataclass(frozen=True)
class SecondOrder:
    """Estimates of (tr Σ)² and tr Σ² for the covariance Σ of centred points, and S, the plain one's, beside them."""

    trace: float
    """tr S, which has no bias."""
    trace_squared: float
    """Of (tr Σ)², without bias."""
    square_trace: float
    """Of tr Σ², without bias; can be ≤ 0 by chance where there are few points."""
    plain_square_trace: float
    """tr S²."""


def second_order(centred: Tensor) -> SecondOrder:
    """From n ≥ 4 points (n, D) whose mean was subtracted, for any distribution with fourth moments.

    With S = Σ z zᵀ / (n − 1) and Q = Σ ‖z‖⁴ / (n − 1): tr Σ² is estimated by c ((n − 1)(n − 2) tr S² + (tr S)² − n Q),
    (tr Σ)² by c (2 tr S² + (n² − 3n + 1)(tr S)² − n Q), c = (n − 1) / (n (n − 2)(n − 3)). Plain tr S² is too large by
    about (tr Σ)² / n. T. Himeno, T. Yamada, “Estimations for some functions of covariance matrix in high dimension
    under non-normality and its applications”, 2014.
    """
    n, features = centred.shape
    gram = centred.T @ centred if features <= n else centred @ centred.T
    norms = centred.square().sum(1)
    trace = float(norms.sum()) / (n - 1)
    plain = float(gram.square().sum()) / (n - 1) ** 2
    Q = float(norms.square().sum()) / (n - 1)
    c = (n - 1) / (n * (n - 2) * (n - 3))
    return SecondOrder(
        trace=trace,
        trace_squared=c * (2 * plain + (n * n - 3 * n + 1) * trace**2 - n * Q),
        square_trace=c * ((n - 1) * (n - 2) * plain + trace**2 - n * Q),
        plain_square_trace=plain,
    )
