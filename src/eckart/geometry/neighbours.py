r"""Exact nearest neighbours, in float64 and in bounded memory; what the estimators of dimension stand on.

A block of rows is compared with all points by ‖x‖² + ‖y‖² − 2⟨x, y⟩ on centred data, which is fast and loses
digits; its k + `SPARE` nearest are measured again by differences, which loses none. A row is accepted when its k-th
distance lies below every point left out by more than the rounding of the first pass can be; the others (many
neighbours at one distance, neighbours 1e-8 times nearer than the data are wide) are done once more by differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.geometry.points import NORMAL_95, as_points, distinct

SPARE = 8
"""Neighbours beyond k that are measured twice."""
BLOCK_NUMBERS = 2**23
"""Float64 numbers of one block: 64 MiB."""
TRUSTED_DIMENSION = 11.0
"""Readings of nearest-neighbour estimators above it are “at least”: 2000 points of a cube of dimension 15 read 11.9
(TwoNN) and 11.4 (MLE), of dimension 50 31 and 28 (`benchmarks/dimension.py`)."""


@dataclass(frozen=True)
class Neighbours:
    """The k nearest other points of each of n points that are all different."""

    points: Tensor
    """(n, D) float64: the distinct rows."""
    distances: Tensor
    """(n, k) float64, ascending, all > 0: T_1 … T_k of every point."""
    indices: Tensor
    """(n, k) int64: which rows of ``points`` they are."""
    duplicates: int
    """Rows that repeated an earlier one and were dropped."""

    @property
    def n(self) -> int:
        return self.distances.shape[0]

    @property
    def k(self) -> int:
        return self.distances.shape[1]

    @cached_property
    def width(self) -> float:
        """Root mean square distance to the mean."""
        return float((self.points - self.points.mean(0)).square().sum(1).mean().sqrt())

    def scale(self, k: int) -> float:
        """Median distance to the k-th neighbour, in units of ``width``: the scale at which the data are looked at."""
        return float(self.distances[:, k - 1].median()) / self.width

    def standard_error(self, values: Tensor, rows: Tensor | None = None) -> float:
        """Standard error of the mean of ``values`` (m,), one for each of ``rows`` (default: every point), that depend
        on its k neighbours.

        Points that share neighbours are not independent. With N_i the point and its neighbours, the products of
        residuals are added up with weight |N_i ∩ N_j| / (k + 1): Var ≈ Σ_c (Σ_{i: c ∈ N_i} e_i)² / ((k + 1) m²),
        a sum of squares. Independent values would give Σ e² / m²; it is never less, which matters where the
        neighbours of a point are most of the points.
        """
        rows = torch.arange(self.n) if rows is None else rows
        residuals = values - values.mean()
        cells = residuals.new_zeros(self.n).index_add_(0, rows, residuals)
        cells.index_add_(0, self.indices[rows].flatten(), residuals[:, None].expand(-1, self.k).flatten())
        shared, alone = float(cells.square().sum()) / (self.k + 1), float(residuals.square().sum())
        return math.sqrt(max(shared, alone)) / rows.numel()

    def nearest(self, k: int) -> Neighbours:
        """The same with the first k neighbours only."""
        return Neighbours(self.points, self.distances[:, :k], self.indices[:, :k], self.duplicates)

    def notes(self) -> tuple[str, ...]:
        """What was dropped, in words."""
        return (f"{self.duplicates} repeated rows dropped",) if self.duplicates else ()


def neighbours(X: Tensor, k: int, *, name: str = "neighbours") -> Neighbours | str:
    """The k nearest neighbours of the distinct rows of X (n, D), or the sentence why there are none.

    Repeated rows are dropped first, all but one, so that no distance is 0. The sentence comes where fewer than k + 1
    distinct rows are left. Raises what :func:`as_points` raises, and InputError unless k ≥ 1.

    Cost: n² D multiply-adds and n² comparisons, in blocks of 64 MiB; 10,000 points in 384 features take 3 s
    on one core.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"{name}: k counts neighbours, an int of at least 1; got {k!r}.")
    everything = as_points(X, name)
    points = distinct(everything)
    n = points.shape[0]
    duplicates = everything.shape[0] - n
    if n < k + 1:
        shown = f"{n} distinct rows" if duplicates else f"{n} rows"
        return f"{shown} of {everything.shape[0]}: {k} neighbours need at least {k + 1}"
    centred = points - points.mean(0)
    largest = float(centred.abs().max())
    if not 1e-100 < largest < 1e100:
        return f"values spread over {largest:.0e}, whose squares leave the range of float64; rescale the data"
    distances, indices = _nearest(centred, k)
    if not bool((distances > 0).all()):
        return "distances between different rows underflow to 0; rescale the data"
    return Neighbours(points, distances, indices, duplicates)


def _nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) distances and indices of the nearest other rows, blockwise."""
    n, features = points.shape
    found = min(k + SPARE, n - 1)
    square = points.square().sum(1)
    rounding = 4 * (features + 4) * torch.finfo(torch.float64).eps * float(square.max())  # worst case of rough
    rows = max(1, BLOCK_NUMBERS // max(n, found * features))
    distances, indices = points.new_empty(n, k), torch.empty(n, k, dtype=torch.int64)
    for start in range(0, n, rows):
        block = torch.arange(start, min(start + rows, n))
        rough = square[block, None] + square - 2 * points[block] @ points.T
        rough[torch.arange(block.numel()), block] = torch.inf
        near, places = rough.topk(found, dim=1, largest=False)
        exact = (points[block, None] - points[places]).square().sum(2)
        exact, order = exact.sort(dim=1)
        places = places.gather(1, order)
        sure = exact[:, k - 1] + rounding < near[:, -1] if found < n - 1 else exact.new_ones(block.numel()).bool()
        distances[block], indices[block] = exact[:, :k].sqrt(), places[:, :k]
        if not bool(sure.all()):
            distances[block[~sure]], indices[block[~sure]] = _nearest_by_differences(points, block[~sure], k)
    return distances, indices


def _nearest_by_differences(points: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gaps = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
    gaps[torch.arange(rows.numel()), rows] = torch.inf
    near, places = gaps.topk(k, dim=1, largest=False)
    return near, places


def at_least(value: float, features: int) -> bool:
    """Whether a reading of a nearest-neighbour estimator is a lower bound: above `TRUSTED_DIMENSION`, below D."""
    return TRUSTED_DIMENSION < value < features


def half_width(standard_error: float) -> float:
    """Of the 95 % interval."""
    return NORMAL_95 * standard_error
