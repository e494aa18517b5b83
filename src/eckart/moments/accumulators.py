"""Running sums over tokens, float64 on the CPU, in two halves and one stack of matrices per site.

Every sum has the leading shape (2, slices): half A and half B of the data, then the matrices of the site.
Sums rather than means, so that batches, processes and data sets add up exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

HALVES = 2
BLOCK = 128
"""Columns of a second moment that are added up at a time."""


def at_float64(rows: Tensor) -> Tensor:
    """On the device of the rows where that has float64, on the CPU otherwise."""
    return rows.cpu() if rows.device.type == "mps" else rows


def to_float64(rows: Tensor) -> Tensor:
    """In float64, there."""
    return at_float64(rows).to(torch.float64)


def add_gram(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Adds weight · rowsᵀ rows to ``total`` (d × d, float64, on the CPU), about N·d²/2 multiply-adds.

    Only blocks on and above the diagonal are added; :func:`symmetrise` fills in the others at the end.

    On the CPU the product of one batch is made in the dtype of the rows, float32 at least, and the sum over
    batches in float64: each entry is right to about √N · 1e-7 of √(C_ii C_jj), a thousandth of its sampling
    error. A float64 product would take twice the time, and a BLAS beside torch's would fight it for the cores.
    On CUDA, where a float32 product may be TF32, it is float64, and of all blocks. Numbers whose squares leave
    float32 are too.
    """
    rows = rows.to(torch.float64 if rows.is_cuda else torch.promote_types(rows.dtype, torch.float32))
    step = len(total) if rows.is_cuda else BLOCK
    for start in range(0, len(total), step):
        product = rows[:, start : start + step].T @ rows[:, start:]
        if not bool(product.sum().isfinite()):
            wide = to_float64(rows)
            product = wide[:, start : start + step].T @ wide[:, start:]
        total[start : start + step, start:].add_(product.to("cpu"), alpha=weight)


def symmetrise(total: Tensor) -> None:
    """(…, d, d): the blocks below the diagonal out of those above; on it, where a product of a matrix with its own
    transpose is symmetric to rounding only, the mean of both."""
    for matrix in total.view(-1, *total.shape[-2:]):
        for start in range(0, len(matrix), BLOCK):
            stop = start + BLOCK
            inner = matrix[start:stop, start:stop]
            inner.copy_((inner + inner.T) / 2)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T


class InputSums:
    """Σ 1, Σ x and Σ x xᵀ of the inputs of a site; for embeddings Σ 1 and how often each entry came."""

    def __init__(self, slices: int, width: int, *, matrix: bool) -> None:
        self.count = torch.zeros(HALVES, slices, dtype=torch.int64)
        self.total = torch.zeros(HALVES, slices, width, dtype=torch.float64)
        self.second = torch.zeros(HALVES, slices, width, width, dtype=torch.float64) if matrix else None

    def add(self, slice_: int, rows: Tensor, picks: Sequence[Tensor]) -> bool:
        """Adds rows (N, width), or ids (N,) of entries, half by half. False where a value is not finite."""
        for half, pick in enumerate(picks):
            if pick.numel() == 0:
                continue
            chosen = rows[pick]
            if self.second is None:
                self.total[half, slice_] += torch.bincount(chosen.cpu(), minlength=self.total.shape[-1])
            else:
                total = at_float64(chosen).sum(0, dtype=torch.float64).cpu()
                if not bool(total.isfinite().all()):
                    return False
                self.total[half, slice_] += total
                add_gram(self.second[half, slice_], chosen)
            self.count[half, slice_] += pick.numel()
        return True

    def finish(self) -> None:
        if self.second is not None:
            symmetrise(self.second)


class GradientSums:
    """Σ ‖g‖², and in the full mode Σ g gᵀ, Σ g_i² ‖x‖² and Σ ‖g‖² x_j², of the gradients at the outputs."""

    def __init__(self, slices: int, out_features: int, in_features: int, *, full: bool, fisher: bool) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(HALVES, slices, *shape, dtype=torch.float64)

        self.scale = zeros()
        self.second = zeros(out_features, out_features) if full else None
        self.rows = zeros(out_features) if fisher else None
        self.columns = zeros(in_features) if fisher else None

    def add(self, slice_: int, rows: Tensor, picks: Sequence[Tensor], inputs: Tensor | None, weight: float) -> bool:
        """Adds gradients (N, out) with the inputs (N, in), or ids (N,), that belong to them, times ``weight``.

        False where a gradient is not finite; nothing of that half is added then.
        """
        for half, pick in enumerate(picks):
            if pick.numel() == 0:
                continue
            g = rows[pick]
            norms = torch.linalg.vector_norm(at_float64(g), dim=1, dtype=torch.float64).square()
            scale = float(norms.sum())
            if not math.isfinite(scale):
                return False
            self.scale[half, slice_] += weight * scale
            if self.second is not None:
                add_gram(self.second[half, slice_], g, weight)
            if self.rows is not None and inputs is not None:
                columns = cast(Tensor, self.columns)[half, slice_]
                x, squares = inputs[pick], to_float64(g).square()
                if x.ndim == 1:
                    self.rows[half, slice_] += weight * squares.sum(0).cpu()
                    columns += weight * torch.bincount(x.cpu(), norms.cpu(), minlength=columns.numel())
                else:
                    x2 = to_float64(x).square()
                    self.rows[half, slice_] += weight * (x2.sum(1) @ squares).cpu()
                    columns += weight * (norms @ x2).cpu()
        return True

    def finish(self) -> None:
        if self.second is not None:
            symmetrise(self.second)
