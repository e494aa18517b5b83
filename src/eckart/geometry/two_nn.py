r"""TwoNN: the intrinsic dimension from the distances to the first and the second neighbour.

*What it does.* Reads how many coordinates data really need, at the finest scale that the sample resolves, from the
ratio of two distances per point. It needs no choice but the form of the fit.

*Formula.* μ = r₂ / r₁ follows F(μ) = 1 − μ^(−d) where the density is constant over both. ``fit="ml"``:
d = (n − 1) / Σ ln μ, the maximum-likelihood value n / Σ ln μ without its bias for independent ratios.
``fit="slope"``: the line through the origin of −ln(1 − F_i) on ln μ_(i), F_i = i / n, over the smallest
(1 − discard) n ratios: d = Σ x y / Σ x². It is less moved by the largest ratios.

*Cost.* Exact neighbours: n² D multiply-adds, see `neighbours.py`.

*When it does not help.* Above about 15: 2000 points of a cube of dimension 2, 5, 10, 15, 20, 50 in 100 features read
2.0, 4.6, 8.7, 11.9, 15.4, 31.3 (`benchmarks/dimension.py`, means of 5), of a 10-sphere 9.4. A reading above 11 is
therefore marked “at least”. Noise has the dimension of the room: the 5-cube with noise of std 0.001, 0.01, 0.05 in
all 100 features reads 4.7, 8.4, 33.7. Look at it over scales (`dimension_curve`). The uncertainty is that of the
sample and holds no such bias. Data on a grid (integers, rounded values) have ties, which a note tells.

*Departs from the paper in.* Repeated rows are dropped, all but one, and counted: with r₁ = 0 there is no ratio.
The paper fits the slope; the maximum-likelihood form is the default because its error is known. Its uncertainty
counts neighbours that points share.

*Reference.* E. Facco, M. d'Errico, A. Rodriguez, A. Laio, “Estimating the intrinsic dimension of datasets by a minimal
neighborhood information”, 2017, https://doi.org/10.1038/s41598-017-11873-y.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> plane = torch.rand(1000, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
>>> found = two_nn(plane)
>>> 1.8 < found.value < 2.2
True
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.geometry.manifolds import cube, noisy
from eckart.geometry.neighbours import Neighbours, at_least, half_width, neighbours
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

NAME = "two_nn_dimension"
TIES = 0.01
"""Share of points with r₁ = r₂ from which a reading carries a note: random points have none."""


def two_nn(X: Tensor, *, fit: Literal["ml", "slope"] = "ml", discard: float = 0.1) -> Finding:
    """The dimension of the points X (n, D) by TwoNN, with a 95 % interval of the sample, not of its bias.

    ``discard``, in [0, 1), is the share of the largest ratios that ``fit="slope"`` leaves out; "ml" uses all. Value
    None, with the reason, where fewer than three different rows are left. Raises InputError for an unknown fit, a
    discard out of range and what is no matrix of numbers, NotFiniteError for NaN and Inf.
    """
    _check(fit, discard)
    found = neighbours(X, 2, name="two_nn")
    if isinstance(found, str):
        return Finding(name=NAME, value=None, n=int(X.shape[0]), notes=(found,))
    return two_nn_of(found, fit=fit, discard=discard)


def two_nn_of(found: Neighbours, *, fit: Literal["ml", "slope"] = "ml", discard: float = 0.1) -> Finding:
    """The same from neighbours that are there already (k ≥ 2)."""
    _check(fit, discard)
    near = found.nearest(2)
    x = (near.distances[:, 1] / near.distances[:, 0]).log()
    total = float(x.sum())
    ties = float((x == 0).double().mean())
    details = {"scale": near.scale(2), "fit": fit, "ties": ties}
    notes = near.notes()
    if ties > TIES:
        notes += (f"first and second neighbour are equally far at {ties:.0%} of the points, as on a grid",)
    if total == 0:
        return Finding(name=NAME, value=None, n=near.n, notes=notes, details=details)
    value = (near.n - 1) / total
    error = value * near.standard_error(x) * near.n / total
    if fit == "slope":
        kept = max(2, math.floor((1 - discard) * near.n))
        ascending = x.sort().values[:kept]
        y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / near.n)
        y, ascending = y[y.isfinite()], ascending[y.isfinite()]
        squares = float(ascending.square().sum())
        if squares == 0:
            return Finding(name=NAME, value=None, n=near.n, notes=notes, details=details)
        value = float(ascending @ y) / squares
    return Finding(
        name=NAME,
        value=value,
        uncertainty=half_width(error),
        n=near.n,
        at_least=at_least(value, near.points.shape[1]),
        notes=notes,
        details=details,
    )


def _check(fit: str, discard: float) -> None:
    if fit not in ("ml", "slope"):
        raise InputError(f"two_nn: fit is 'ml' or 'slope'; got {fit!r}.")
    if not isinstance(discard, (int, float)) or not 0 <= discard < 1:
        raise InputError(f"two_nn: discard is a share in [0, 1); got {discard!r}.")


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for d in (2, 5, 10):
        readings = [two_nn(cube(1000, d, 20, seed=seed), fit="slope").value or math.nan for seed in range(5)]
        figures[f"cube of dimension {d}"] = sum(readings) / 5
        held = held and abs(sum(readings) / 5 - d) < 0.15 * d
    plane = [noisy(cube(n, 2, 20, seed=7), 0.005, seed=8) for n in (4000, 250)]
    fine, coarse = (two_nn(X, fit="slope").value or math.nan for X in plane)
    figures |= {"noisy plane, 4000 points": fine, "noisy plane, 250 points": coarse}
    return Verdict(
        held=held and abs(coarse - 2) < abs(fine - 2),
        figures=figures,
        note="mean reading of 5 samples of 1000 points in 20 features; the plane has noise of std 0.005",
    )


METHOD = Diagnostic(
    name="two-nn",
    summary="intrinsic dimension from the first two neighbours of every point",
    group="data",
    paper=Paper(
        authors="E. Facco, M. d'Errico, A. Rodriguez, A. Laio",
        title="Estimating the intrinsic dimension of datasets by a minimal neighborhood information",
        year=2017,
        link="https://doi.org/10.1038/s41598-017-11873-y",
    ),
    entry=two_nn,
    claim=Claim(
        statement="1000 points of uniform cubes of dimension 2, 5 and 10 read within 15 % of it; of a plane with "
        "noise, fewer points read nearer to 2 than many.",
        source="Facco et al. 2017: figures on uniform hypercubes and on scale (block analysis of a noisy plane)",
        run=_run_claim,
    ),
)
