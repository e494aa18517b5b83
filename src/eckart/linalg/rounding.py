r"""Weights rounded to integers, group by group, to the nearest or with error feedback.

*What it does.* Splits each row of W into groups of neighbouring columns and stores for each group a scale, a zero
and one small integer per weight. With the second moment of the inputs, the error of each rounded column is made up
for by the columns that are still free.

*Formula.* ŵ = s (c − z), c ∈ {0 … 2ᵇ − 1}. Asymmetric: s = (hi − lo)/(2ᵇ − 1) and z = round(−lo/s) over the group,
with 0 in [lo, hi]; symmetric: s = max|w| / (2ᵇ⁻¹ − 1) and z = 2ᵇ⁻¹. Feedback minimises tr(ΔW H ΔWᵀ) greedily, with
H = Σ + λI, λ = damping · tr(Σ)/n: after column j was rounded with error e = w_j − ŵ_j, the free columns F take up
W_F ← W_F − e [H⁻¹]_jF / [H⁻¹]_jj, where H⁻¹ is the inverse over j and F alone. With H = R Rᵀ, R upper triangular,
those ratios are row j of the inverse of R with its columns divided by their pivots: one Cholesky factorisation and
one triangular inverse for all columns, no inverse of H.

*Cost.* To the nearest: m n. With feedback: n³ + m n², in blocks of columns. The clip search: 20 times the nearest.

*When it does not help.* At 8 bits there is little left to win. A symmetric grid wastes range and was worse at every
width tried. Feedback fits Σ: on data unlike the calibration, or where Σ comes from fewer tokens than inputs, it can
lose to the nearest. It lowers the error of one layer's outputs, not that of the model. On a small language model (28
maps of width 128, groups of 128) the loss rose by .046 nats at 4 bits to the nearest, .037 with the clip search, .016
with feedback as well; at 2 bits in groups of 32, both with the clip search, by .73 to the nearest and .37 with
feedback; at 8 bits by .0001.

*Departs from the paper in.* The scales come from W before any feedback, so that any order of columns goes with groups
of neighbours; the paper takes those of a group when it gets there. The factor of H⁻¹ comes from H in one step rather
than from its inverse. What is fed back is the error of the number that is stored, in the dtype of the scales. The
range of a group is searched, by squared error weighted by the diagonal of Σ.

*Reference.* E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, “GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers”, 2022, https://arxiv.org/abs/2210.17323.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(8, 32, generator=generator, dtype=torch.float64)
>>> mix = torch.randn(6, 32, generator=generator, dtype=torch.float64)
>>> X = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mix
>>> nearest = round_groups(W, bits=3, group=16)
>>> fed_back = round_groups(W, bits=3, group=16, second=X.T @ X / 200)
>>> bool((X @ (W - fed_back.dense()).T).norm() < (X @ (W - nearest.dense()).T).norm())
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.linalg.exact import as_float64

Order = Literal["falling", "natural"]

_BLOCK = 128
"""Columns that are rounded before their errors reach the columns beyond; changes speed only."""
_CHUNK = 1 << 24
"""Entries of W that are in work at a time; rows do not depend on each other."""
_CLIP = tuple(1 - i / 32 for i in range(20))
"""Shares of the range of a group that the clip search tries."""
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """A matrix (m, n) on an integer grid: entry (i, j) is scale (code − zero), by row and group of columns."""

    codes: Tensor
    """(m, n) uint8, each below 2ᵇ."""
    scale: Tensor
    """(m, groups), in the dtype that is stored."""
    zero: Tensor
    """(m, groups) uint8."""
    bits: int
    group: int
    """Columns of a group; the last one may have fewer."""

    def dense(self) -> Tensor:
        """(m, n) in the dtype of ``scale``."""
        return on_grid(self.codes, self.scale, self.zero, self.group)


def on_grid(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """scale (codes − zero), (m, n) in the dtype of ``scale``, for groups of ``group`` columns."""
    (m, n), groups = codes.shape, scale.shape[1]
    filled = torch.nn.functional.pad(codes, (0, groups * group - n)).view(m, groups, group)
    steps = filled.to(scale.dtype) - zero.to(scale.dtype).unsqueeze(-1)
    return (steps * scale.unsqueeze(-1)).flatten(1)[:, :n]


def round_groups(
    W: Tensor,
    *,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    second: Tensor | None = None,
    order: Order = "falling",
    damping: float = 0.01,
    clip: bool = True,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """W (m, n) on an integer grid of ``bits`` per entry, computed in float64 on the CPU.

    Args:
        bits: 2 … 8.
        group: columns that share a scale, None for the whole row; the last group may be shorter.
        symmetric: zero in the middle of the integers, rather than where the group's range puts it.
        second: Σ = E[x xᵀ] (n, n), singular or not; None rounds to the nearest.
        order: in which the columns are rounded with feedback: by ``falling`` diagonal of Σ, or ``natural``.
        damping: λ in multiples of the mean of Σ's diagonal, above 0.
        clip: try smaller ranges for each group and keep the one with the least squared error of the nearest
            integers, weighted by the diagonal of Σ where there is one; False keeps the largest weight exact.
        dtype: of the scales; None for that of W. They are rounded to it before the integers are chosen.

    Raises InputError, with everything that is wrong, for options and shapes that cannot be, and for a Σ that is not
    positive semi-definite; NotFiniteError for NaN and Inf.
    """
    stored = W.dtype if dtype is None else dtype
    _check(W, bits, group, second, order, damping, stored)
    n = W.shape[1]
    size = n if group is None else min(group, n)
    sigma = None if second is None else as_float64(second, "second", (2,))
    weights = None if sigma is None else sigma.diagonal().clamp(min=0.0)
    feedback = None if sigma is None else _feedback(sigma, order, damping)
    parts = []
    for rows in torch.split(W, max(1, _CHUNK // n)):
        part = as_float64(rows, "W", (2,))
        scale, zero = _grid(part, bits, size, symmetric, stored, weights, clip)
        if feedback is None:
            codes = _codes(_grouped(part, size), scale.unsqueeze(-1), zero.unsqueeze(-1), bits).flatten(1)[:, :n]
        else:
            codes = _fed_back(part, scale, zero, bits, size, feedback, stored)
        parts.append((codes.to(torch.uint8), scale.to(stored), zero.to(torch.uint8)))
    codes, scale, zero = (torch.cat(found).contiguous() for found in zip(*parts, strict=True))
    return Rounded(codes=codes, scale=scale, zero=zero, bits=bits, group=size)


def _check(
    W: Tensor, bits: int, group: int | None, second: Tensor | None, order: str, damping: float, stored: torch.dtype
) -> None:
    wrong = []
    if W.ndim != 2 or 0 in W.shape:
        wrong.append(f"W: expected a matrix with entries; got shape {tuple(W.shape)}")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        wrong.append(f"bits is an int from 2 to 8; got {bits!r}")
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        wrong.append(f"group is None or an int of at least 1; got {group!r}")
    if second is not None and W.ndim == 2 and tuple(second.shape) != (W.shape[1], W.shape[1]):
        wrong.append(f"second: expected shape {(W.shape[1], W.shape[1])}; got {tuple(second.shape)}")
    if order not in ("falling", "natural"):
        wrong.append(f"order is 'falling' or 'natural'; got {order!r}")
    if not 0 < damping < float("inf"):
        wrong.append(f"damping is a number above 0; got {damping!r}")
    if stored not in _STORED:
        wrong.append(f"scales are stored as float16, bfloat16, float32 or float64; got {stored}")
    if wrong:
        raise InputError(problems("round_groups", wrong))


def _grouped(W: Tensor, group: int) -> Tensor:
    """(m, groups, group), the last group filled up with zeros, which lie on every grid."""
    m, n = W.shape
    groups = -(-n // group)
    return torch.nn.functional.pad(W, (0, groups * group - n)).view(m, groups, group)


def _codes(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest integers, in the dtype of W."""
    return (W / scale + zero).round().clamp(0, 2**bits - 1)


def _grid(
    W: Tensor, bits: int, group: int, symmetric: bool, stored: torch.dtype, weights: Tensor | None, clip: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero (m, groups), float64 values that ``stored`` holds exactly."""
    G = _grouped(W, group)
    low, high = G.amin(-1).clamp(max=0.0), G.amax(-1).clamp(min=0.0)
    if not clip:
        return _scaled(low, high, bits, symmetric, stored)
    weight = G.new_ones(1) if weights is None else _grouped(weights.clamp(min=0.0).unsqueeze(0), group)
    best, scale, zero = G.new_full(low.shape, float("inf")), low, low
    for share in _CLIP:
        s, z = _scaled(share * low, share * high, bits, symmetric, stored)
        steps = _codes(G, s.unsqueeze(-1), z.unsqueeze(-1), bits) - z.unsqueeze(-1)
        error = (steps * s.unsqueeze(-1) - G).square().mul(weight).sum(-1)
        less = error < best
        best, scale, zero = error.where(less, best), s.where(less, scale), z.where(less, zero)
    return scale, zero


def _scaled(low: Tensor, high: Tensor, bits: int, symmetric: bool, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    reach = torch.maximum(-low, high) / (top // 2) if symmetric else (high - low) / top
    # A group of zeros, or one too small for the dtype, gets the smallest scale: 0 would divide.
    scale = reach.to(stored).double().clamp(min=torch.finfo(stored).tiny)
    if not scale.isfinite().all():
        raise InputError(f"W: a scale of {float(reach.max()):.3g} does not fit into {stored}. Store float32.")
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    return scale, zero


def _feedback(sigma: Tensor, order: Order, damping: float) -> tuple[Tensor, Tensor]:
    """Columns in the order of rounding, and the ratios [H⁻¹]_jk / [H⁻¹]_jj (n, n) of each with those after it."""
    diagonal = sigma.diagonal()
    n = diagonal.numel()
    columns = diagonal.argsort(descending=True, stable=True) if order == "falling" else torch.arange(n)
    identity = torch.eye(n, dtype=sigma.dtype)
    H = sigma + (damping * float(diagonal.mean()) or 1.0) * identity  # without any input, any H serves
    L, info = torch.linalg.cholesky_ex(H[columns][:, columns].flip(0, 1))
    if info:
        raise InputError("second: expected a positive semi-definite matrix, such as E[x xᵀ]; this one is not.")
    R = L.flip(0, 1)  # upper triangular, H = R Rᵀ
    return columns, torch.linalg.solve_triangular(R / R.diagonal(), identity, upper=True, unitriangular=True)


def _fed_back(
    W: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    feedback: tuple[Tensor, Tensor],
    stored: torch.dtype,
) -> Tensor:
    """The integers (m, n), column after column, each column's error taken up by those after it."""
    columns, ratios = feedback
    n = columns.numel()
    X = W.T[columns].contiguous()  # one row per column of W, in the order of rounding
    s, z = scale.T[columns // group], zero.T[columns // group]
    codes = torch.empty_like(X)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        errors = torch.empty_like(X[start:stop])
        for j in range(start, stop):
            codes[j] = _codes(X[j], s[j], z[j], bits)
            error = X[j] - ((codes[j] - z[j]) * s[j]).to(stored)
            X[j + 1 : stop].addr_(ratios[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        X[stop:].addmm_(ratios[start:stop, stop:].T, errors, alpha=-1)
    return codes[columns.argsort()].T
