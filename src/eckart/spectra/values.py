"""All singular values of a weight, from the Gram matrix of its smaller side, in blocks of the longer one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg import matricize
from eckart.records import Finding, SiteKind

_BLOCK = 1 << 22
"""Numbers of the weight that are converted at a time."""
_EPSILONS = 8.0
"""The eigenvalues of a Gram matrix are right to about this many eps of the largest one."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a weight as a stack of matrices, or why it has none."""

    values: Tensor
    """(slices, min(out, in)) float64 on the CPU, each row falling; (slices, 0) where there is a ``flaw``."""
    out_features: int
    in_features: int
    resolution: float
    """Values below ``resolution`` · σ₁ are rounding: 4e-8 from a Gram matrix in float64, 1e-3 in float32."""
    flaw: str = ""
    """What keeps it from being measured: “3 of 400 entries are NaN or Inf”."""

    @property
    def short(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def long(self) -> int:
        return max(self.out_features, self.in_features)

    @property
    def aspect(self) -> float:
        """The longer side over the shorter, at least 1."""
        return self.long / self.short


def as_matrices(W: Tensor, name: str, kind: SiteKind | None = None, groups: int = 1) -> Tensor:
    """A weight as (slices, out, in), a view wherever torch can give one; see :func:`eckart.linalg.matricize`.

    Without a ``kind``: 2-D is a map (out, in), 3-D a stack (slices, out, in), more a convolution without groups.
    Raises InputError for what is no tensor of real floats with numbers in it and at least two dimensions.
    """
    if not isinstance(W, Tensor):
        raise InputError(f"{name}: expected a tensor; got {type(W).__name__}.")
    if reason := unmeasurable(W):
        raise InputError(f"{name}: expected a weight of real numbers, (out, in) or a stack of them; {reason}.")
    if kind is None:
        kind = {2: "linear", 3: "experts"}.get(W.ndim, "conv")  # type: ignore[assignment]
    return matricize(W.detach(), kind or "linear", groups)


INDICES = (torch.int64, torch.bool)
"""Types that no weight is stored in."""


def unmeasurable(W: Tensor) -> str:
    """Why a tensor has no spectrum that could be measured, in words; empty where it has one."""
    dtype = str(W.dtype).removeprefix("torch.")
    if W.is_meta:
        return "it is on the meta device and has no numbers"
    if W.layout is not torch.strided:
        return f"it is sparse ({str(W.layout).removeprefix('torch.')}); densify it to measure it"
    if W.is_quantized or not W.dtype.is_floating_point:
        if W.is_complex():
            return f"{dtype}: complex numbers"
        return f"{dtype}: {'indices or a mask' if W.dtype in INDICES else 'integers, quantised weights or indices'}"
    if W.dtype.itemsize < 2:
        return f"{dtype}: quantised, with scales that lie elsewhere; dequantise it to measure it"
    if W.numel() == 0:
        return f"it is empty, shape {tuple(W.shape)}"
    if W.ndim < 2:
        return f"{W.ndim}-D: it is no matrix and has no spectrum"
    return ""


def singular_values(
    W: Tensor | Spectrum, *, kind: SiteKind | None = None, groups: int = 1, dtype: torch.dtype | None = None
) -> Spectrum:
    """Every singular value of W: the roots of the eigenvalues of its smaller Gram matrix.

    The weight is read in blocks of 4 million numbers, so that beside it only the Gram matrix takes memory, and it may
    be a view of a file larger than memory. ``dtype`` is that of the work: float64 by default, on accelerators float32.
    For an m × n matrix, m ≤ n, it costs about m² n multiply-adds and 4/3 m³ for the eigenvalues.

    The eigenvalues are right to about 8 eps · σ₁², so that of σ_i to 4 eps (σ₁/σ_i)², and what lies below
    ``resolution`` = √(8 eps) · σ₁ is rounding. NaN and Inf give a Spectrum with a ``flaw``. A Spectrum is
    returned as it is. Raises InputError as ``as_matrices`` does, and for a ``dtype`` that is neither.
    """
    if isinstance(W, Spectrum):
        return W
    matrices = as_matrices(W, "singular_values", kind, groups)
    dtype = dtype or (torch.float64 if matrices.device.type == "cpu" else torch.float32)
    if dtype not in (torch.float64, torch.float32):
        raise InputError(f"singular_values: dtype is torch.float64 or torch.float32; got {dtype}.")
    slices, out, columns = matrices.shape
    resolution = math.sqrt(_EPSILONS * torch.finfo(dtype).eps)
    if flaw := not_finite(matrices):
        return Spectrum(torch.empty(slices, 0, dtype=torch.float64), out, columns, resolution, flaw)
    values = torch.stack([_values(matrix, dtype) for matrix in matrices])
    return Spectrum(values, out, columns, resolution)


def not_finite(W: Tensor) -> str:
    """How many entries are NaN or Inf, in words; empty for none. Takes no memory where all are finite."""
    # A sum is NaN or Inf where an entry is (or where it overflows); only then are the entries looked at one by one.
    if bool(W.sum().isfinite()):
        return ""
    bad = sum(int((~block.isfinite()).sum()) for matrix in W.reshape(-1, *W.shape[-2:]) for block in blocks(matrix))
    return f"{bad} of {W.numel()} entries are NaN or Inf" if bad else ""


def largest_entry(matrix: Tensor) -> float:
    """max |w|, 0 for none; the weight is read as it lies in memory."""
    stored = matrix if matrix.stride(0) >= matrix.stride(1) else matrix.T
    return max((float(torch.linalg.vector_norm(part, math.inf)) for part in blocks(stored)), default=0.0)


def frobenius(matrix: Tensor) -> float:
    """‖W‖_F in float64, read in blocks; overflows only beyond 1e154."""
    stored = matrix if matrix.stride(0) >= matrix.stride(1) else matrix.T
    return math.sqrt(sum(float(part.to(torch.float64).square().sum()) for part in blocks(stored)))


def blocks(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix in blocks of about 4 million numbers."""
    yield from torch.split(matrix, max(1, _BLOCK // max(matrix.shape[1], 1)))


def gram(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The lower triangle of the Gram matrix of the smaller side of ``matrix`` / scale, and the scale.

    (m, n) gives A Aᵀ for m ≤ n and AᵀA otherwise. Only blocks on and below the diagonal are computed, little
    more than half of the work. The scale is the largest entry, so that squares neither overflow nor vanish.
    """
    A = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    p = A.shape[0]
    scale = largest_entry(matrix)
    G = torch.zeros(p, p, dtype=dtype, device=A.device)
    if scale == 0:
        return G, 0.0
    step = max(128, -(-p // 16))
    for part in torch.split(A, max(1, _BLOCK // p), dim=1):
        # Divided in two steps: 1/scale overflows for the smallest numbers there are.
        C = part.to(dtype) / scale
        for start in range(0, p, step):
            rows = C[start : start + step]
            G[start : start + step, : start + step].addmm_(rows, C[: start + step].T)
    return G, scale


def _values(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    G, scale = gram(matrix, dtype)
    found: Tensor = torch.linalg.eigvalsh(G, UPLO="L").flip(0)
    return found.clamp_min(0).to("cpu", torch.float64).sqrt() * scale


def over_slices(name: str, parts: list[Finding]) -> Finding:
    """One Finding for a stack of matrices: the mean, with the values of all in ``details["slices"]``."""
    if len(parts) == 1:
        return parts[0]
    values = [part.value for part in parts if part.value is not None]
    lost = len(parts) - len(values)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if lost:
        notes = (f"not measured in {lost} of {len(parts)} matrices", *notes)
    if not values:
        return Finding(name=name, value=None, notes=notes)
    widths = [part.uncertainty for part in parts if part.value is not None]
    known = [width for width in widths if width is not None]
    return Finding(
        name=name,
        value=sum(values) / len(values),
        uncertainty=math.hypot(*known) / len(values) if len(known) == len(widths) else None,
        n=sum(part.n for part in parts if part.n is not None) or None,
        unit=parts[0].unit,
        at_least=any(part.at_least for part in parts),
        notes=(f"mean of {len(values)} matrices, from {min(values):.4g} to {max(values):.4g}", *notes),
        details={"slices": [part.value for part in parts]},
    )
