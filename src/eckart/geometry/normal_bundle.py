r"""Local dimension from the scores of a diffusion model, by the directions that point back to the data.

*What it does.* Just off the data manifold the score, the gradient of the log-density, points straight back at it.
Scores around one point therefore span the directions normal to the manifold; what they do not span is its dimension
there.

*Formula.* s_i = score(x + σ z_i), z_i ~ N(0, I), i = 1 … K, K = probes · D; singular values ς_1 ≥ … ≥ ς_D of the rows
s_i; dimension = D − argmax_i (ς_i − ς_{i+1}), from 1 to D − 1.

*Cost.* K calls of the score (in batches) and an SVD of K × D for each point.

*When it does not help.* It is only as good as the score at that σ. σ must be small beside the curvature and the spacing
that the model learned, and large enough for the model to be accurate. Without a manifold, or with none at that scale,
there is still a largest gap: a note says so where ς_i / ς_{i+1} < 3, which K = 4 D scores without any structure reach.
It never says 0 or D. Curvature blurs the gap on high-dimensional images. A score that is no gradient has no such
meaning: see `score_gauge`.

*Departs from the paper in.* The score at the wanted noise level is one callable, so that no noise schedule is needed:
for a variance-preserving model at t₀ = 1e-4, bind t and give σ = √(1 − α(t₀)²).

*Reference.* J. Stanczuk, G. Batzolis, T. Deveney, C.-B. Schönlieb, “Your diffusion model secretly knows the dimension
of the data manifold”, 2022, https://arxiv.org/abs/2212.12611.

*Example.*

>>> import torch
>>> def score(x):  # of points on a plane in 5 dimensions, noised with σ = 0.1
...     return torch.cat([-x[:, :2] / 1.01, -x[:, 2:] / 0.01], 1)
>>> print(normal_bundle(score, torch.zeros(1, 5), sigma=0.1))
normal_bundle_dimension: 2 (n = 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError, problems
from eckart.geometry.manifolds import sphere
from eckart.geometry.pca_dimension import pca_dimension
from eckart.geometry.points import NORMAL_95, as_points
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

NAME = "normal_bundle_dimension"
CLEAR = 3.0
"""ς_1 / ς_D of 4 D Gaussian scores in D dimensions: (1 + 1/2) / (1 − 1/2)."""


def normal_bundle(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    sigma: float,
    probes: int = 4,
    batch: int = 1024,
    seed: int = 0,
) -> Finding:
    """The mean local dimension at the points x (m, D), D ≥ 2, with a 95 % interval over them where m > 1.

    ``score`` takes (B, D) to (B, D), at the noise level whose std is ``sigma`` > 0; it gets x's dtype and device,
    ``batch`` rows at most, and no gradient. ``probes`` · D scores are taken at each point. ``details``: ``dimensions``
    of the points and their ``gaps`` ς_i / ς_{i+1}. Raises InputError for options out of range, one feature and a score
    of the wrong shape, NotFiniteError for NaN and Inf in x or in scores.
    """
    m, D = as_points(x, "normal_bundle").shape
    found = [
        f"{name} is an int of at least 1; got {value!r}"
        for name, value in (("probes", probes), ("batch", batch))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
        found.append(f"sigma is the std of the noise, a positive number; got {sigma!r}")
    if not x.is_floating_point():
        found.append(f"x is in the model's dtype, floating point; got {x.dtype}")
    if D < 2:
        found.append("x has one feature, so no direction can be normal to another")
    if found:
        raise InputError(problems("normal_bundle", found))
    generator = torch.Generator().manual_seed(seed)
    dimensions, gaps = [], []
    for point in x.detach():
        noise = torch.randn(probes * D, D, generator=generator, dtype=torch.float64).to(point)
        with torch.no_grad():
            scores = torch.cat([_scored(score, part) for part in (point + sigma * noise).split(batch)])
        values = torch.linalg.svdvals(scores)
        normal = int((values[:-1] - values[1:]).argmax()) + 1
        dimensions.append(D - normal)
        gaps.append(float(values[normal - 1]) / max(float(values[normal]), 1e-300))
    unclear = sum(gap < CLEAR for gap in gaps)
    spread = float(torch.tensor(dimensions, dtype=torch.float64).std()) / math.sqrt(m) if m > 1 else None
    return Finding(
        name=NAME,
        value=sum(dimensions) / m,
        uncertainty=None if spread is None else NORMAL_95 * spread,
        n=m,
        notes=(f"no clear gap at {unclear} of {m} points: the scores show no manifold there",) if unclear else (),
        details={"dimensions": dimensions, "gaps": gaps},
    )


def _scored(score: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The scores in float64 on the CPU, checked."""
    scores = score(points)
    if not isinstance(scores, Tensor) or scores.shape != points.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"normal_bundle: score takes (B, D) to (B, D), here {tuple(points.shape)}; it gave {got}.")
    if not bool(scores.isfinite().all()):
        raise NotFiniteError(
            "normal_bundle: the score gave NaN or Inf; try a larger sigma or points nearer to the data."
        )
    return scores.to(device="cpu", dtype=torch.float64)


def smoothed_score(data: Tensor, sigma: float) -> Callable[[Tensor], Tensor]:
    """The exact score of ``data`` (n, D) with noise of std ``sigma``: what a perfect diffusion model of them has."""

    def score(x: Tensor) -> Tensor:
        weights = (-torch.cdist(x, data).square() / (2 * sigma**2)).softmax(1)
        return (weights @ data - x) / sigma**2

    return score


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for d, n in ((1, 1000), (2, 4000), (3, 8000)):
        data = sphere(n, d, 10, seed=d)
        found = normal_bundle(smoothed_score(data, 0.1), data[:10], sigma=0.1)
        linear = float(pca_dimension(data)[1])
        figures |= {f"sphere of dimension {d}": float(found), f"PCA, sphere of dimension {d}": linear}
        held = held and abs(float(found) - d) < 0.2 and linear > d
    return Verdict(held=held, figures=figures, note="10 points each in 10 features, exact scores at σ = 0.1")


METHOD = Diagnostic(
    name="normal-bundle",
    summary="local dimension from the scores of a diffusion model around a point",
    group="data",
    paper=Paper(
        authors="J. Stanczuk, G. Batzolis, T. Deveney, C.-B. Schönlieb",
        title="Your diffusion model secretly knows the dimension of the data manifold",
        year=2022,
        link="https://arxiv.org/abs/2212.12611",
    ),
    entry=normal_bundle,
    claim=Claim(
        statement="Scores around points of spheres of dimension 1, 2 and 3 give that dimension, where PCA gives "
        "one more.",
        source="Stanczuk et al. 2022: experiments on spheres, against PPCA",
        run=_run_claim,
    ),
)
