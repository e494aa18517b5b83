r"""The law of Marchenko and Pastur: where the squared singular values of pure noise lie.

For an m × n matrix of independent entries with variance v, c = m/n ≤ 1, the eigenvalues of W Wᵀ / (n v) fill the
interval [(1−√c)², (1+√c)²] as both sides grow, whatever the law of the entries, with density
√((x − a)(b − x)) / (2π c x). With x = 1 + c + 2√c cos θ the density in θ ∈ [0, π] is (2/π) sin²θ / x, smooth up to
c = 1, and its integral is elementary, see :func:`_above`.

V. A. Marchenko, L. A. Pastur, “Distribution of eigenvalues for some sets of random matrices”, 1967; for the largest
one: I. M. Johnstone, “On the distribution of the largest eigenvalue in principal components analysis”, 2001.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from eckart.errors import InputError

TRACY_WIDOM = {0.5: -1.2686, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2724}
"""Quantiles of the Tracy–Widom law of real matrices (β = 1)."""


def noise_edges(m: int, n: int) -> tuple[float, float]:
    """Least and largest singular value of m × n noise of variance 1 as the sides grow: |√n − √m| and √n + √m."""
    return abs(math.sqrt(n) - math.sqrt(m)), math.sqrt(n) + math.sqrt(m)


def noise_top(m: int, n: int, level: float = 0.99) -> float:
    """What the largest singular value of m × n noise of variance 1 stays below with probability ``level``.

    Johnstone's centring and scale with the Tracy–Widom quantile; within some percent of the distance to the edge from
    sides of about 10. ``level``: one of 0.5, 0.95, 0.99, 0.999.
    """
    if level not in TRACY_WIDOM:
        raise InputError(f"noise_top: level is one of {', '.join(map(str, TRACY_WIDOM))}; got {level!r}.")
    a, b = math.sqrt(max(max(m, n) - 0.5, 0.5)), math.sqrt(max(min(m, n) - 0.5, 0.5))
    return math.sqrt((a + b) ** 2 + TRACY_WIDOM[level] * (a + b) * (1 / a + 1 / b) ** (1 / 3))


def noise_cdf(eigenvalues: Tensor, aspect: float) -> Tensor:
    """P(X ≤ x) of the eigenvalues of W Wᵀ / (n v) at noise of ``aspect`` n/m ≥ 1; float64."""
    c = _share(aspect)
    cosine = (eigenvalues.double() - 1 - c) / (2 * math.sqrt(c))
    return 1 - _above(cosine.clamp(-1, 1).acos(), c)


def noise_quantiles(levels: Tensor, aspect: float) -> Tensor:
    """The eigenvalues below which the shares ``levels`` (in [0, 1]) of noise of ``aspect`` n/m ≥ 1 lie; float64."""
    c = _share(aspect)
    wanted = 1 - levels.double()
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, math.pi)
    middle = (low + high) / 2
    for _ in range(60):  # Newton inside of the bracket, which halves where a step would leave it
        gap = _above(middle, c) - wanted
        low, high = torch.where(gap < 0, middle, low), torch.where(gap < 0, high, middle)
        slope = (2 / math.pi) * middle.sin().square() / (1 + c + 2 * math.sqrt(c) * middle.cos()).clamp_min(1e-300)
        step = middle - gap / slope.clamp_min(1e-300)
        # With slack, or a value that has converged onto an end of its bracket would be thrown out of it by rounding.
        near = (step > low - 1e-9) & (step < high + 1e-9)
        before, middle = middle, torch.where(near, step.clamp(low, high), (low + high) / 2)
        if float((middle - before).abs().max()) < 1e-14:
            break
    return 1 + c + 2 * math.sqrt(c) * middle.cos()


@functools.lru_cache(maxsize=4096)
def noise_median(m: int, n: int) -> float:
    """The median of the eigenvalues of W Wᵀ / (v · longer side) of m × n noise, the 0.5 of :func:`noise_quantiles`."""
    return float(noise_quantiles(torch.tensor([0.5], dtype=torch.float64), max(m, n) / min(m, n)))


@functools.lru_cache(maxsize=64)
def noise_spectrum(m: int, n: int) -> Tensor:
    """(p,) singular values, falling, of m × n noise of variance 1, p = min(m, n): the quantiles at (i − ½)/p.

    The tensor is kept for the next call with the same shape: do not write into it.
    """
    p, q = min(m, n), max(m, n)
    levels = 1 - (torch.arange(p, dtype=torch.float64) + 0.5) / p
    return (noise_quantiles(levels, q / p) * q).sqrt()


def _share(aspect: float) -> float:
    if not aspect >= 1 or math.isinf(aspect):
        raise InputError(f"the aspect of noise is its longer side over its shorter one, at least 1; got {aspect!r}.")
    return 1 / aspect


def _above(theta: Tensor, c: float) -> Tensor:
    """P(X > 1 + c + 2√c cos θ).

    With A = 1 + c, B = 2√c: sin²θ = 1 − cos²θ divides by A + B cos θ as −cos θ/B + A/B² − ((A² − B²)/B²)/(A + B cos θ),
    where A² − B² = (1 − c)², and ∫dθ/(A + B cos θ) = 2/(1 − c) · atan((1 − √c)/(1 + √c) · tan(θ/2)).
    """
    r = math.sqrt(c)
    turn = torch.atan((1 - r) / (1 + r) * torch.tan(theta / 2))
    return (2 / math.pi) * ((1 + c) * theta / (4 * c) - theta.sin() / (2 * r) - (1 - c) / (2 * c) * turn)
