r"""Noise and what stands out of it: the law of Marchenko and Pastur fitted to the bulk of a spectrum.

*What it does.* Fits the spectrum that pure noise of the same shape would have to the middle of the weight's, counts
the singular values that lie above its edge (spikes), and says how well the rest fits.

*Formula.* For m × n, m ≤ n, of independent entries with variance s² the λ = σ² fill s²(√n ± √m)². s² is fitted so
that the median of the λ that are not spikes is that of the law; spikes are the σ above s · t₀.₉₉, the 99 % quantile of
the largest σ of noise (Tracy–Widom about √n + √m), times 1 + 1/p for the error of s; both are repeated until neither
changes. ``bulk_fit`` = 1 − D with D = sup |F(λ) − F_MP(λ)| over the bulk: if a share 1 − ε of the bulk follows the law,
then D ≤ ε, so at most ``bulk_fit`` of the bulk is noise.

*Cost.* The spectrum, see :func:`eckart.spectra.spectrum`; then p log p.

*When it does not help.* Entries of unequal variance (rows of different scale, as after training with norms) spread
the bulk although they may be noise: the fit is bad and the spikes are too many. Correlated entries the same. A spike
weaker than about (mn)^¼ s leaves no trace in the spectrum at all (the threshold of Baik, Ben Arous and Péché), so
``spikes`` counts what can be seen, not the rank of the signal.

*Departs from the paper in.* The paper is about the law only. Fitting to the median, not to the largest value or by
least squares on a histogram, has no bin width and is not moved by spikes. Of noise
alone about 1 matrix in 100 shows a spike, at a side of 16 2 in 100.

*Reference.* V. A. Marchenko, L. A. Pastur, “Distribution of eigenvalues for some sets of random matrices”, 1967;
spikes: F. Benaych-Georges, R. R. Nadakuditi, “The singular values and vectors of low rank perturbations of large
rectangular random matrices”, 2012.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = 0.02 * torch.randn(200, 400, generator=generator)
>>> W[:, 0] += 0.1
>>> for finding in marchenko_pastur(W).values():
...     print(finding)
noise_scale: 0.01998 ± 0.0002 (n = 200)
noise_edge: 0.682 (n = 200)
spikes: 1 (n = 200)
spike_energy: 0.06618 (n = 200)
bulk_fit: 0.9876 (n = 200)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.noise import noise_cdf, noise_edges, noise_median, noise_spectrum, noise_top
from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.values import Spectrum, over_slices, singular_values

NAMES = ("noise_scale", "noise_edge", "spikes", "spike_energy", "bulk_fit")
"""The findings of :func:`marchenko_pastur`."""

FEWEST = 8
"""Singular values that a fit needs."""
_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Bulk:
    """Noise fitted to one matrix."""

    scale: float
    """s, the standard deviation of an entry."""
    threshold: float
    """σ above which a value is a spike: 99 % of noise matrices have none."""
    spikes: int
    distance: float
    """D of Kolmogorov and Smirnov between the bulk and the law."""


def marchenko_pastur(W: Tensor | Spectrum, *, kind: SiteKind | None = None, groups: int = 1) -> dict[str, Finding]:
    """The noise in a weight (out, in) and the spikes above it, by name: ``NAMES`` of its module.

    - ``noise_scale``: standard deviation of an entry of the noise that fits the bulk;
    - ``noise_edge``: σ up to which that noise reaches, s(√n + √m);
    - ``spikes``: singular values above what 99 % of such noise matrices stay below;
    - ``spike_energy``: share of the squared norm in them, in [0, 1];
    - ``bulk_fit``: at most this share of the other values follows the law, in [0, 1]. Noise of side p reads about
      1 − 1/p.

    A stack of matrices gives means. None with a note for NaN, zeros, and fewer than 8 singular values.
    """
    s = singular_values(W, kind=kind, groups=groups)
    if s.flaw:
        return {name: Finding(name=name, value=None, notes=(s.flaw,)) for name in NAMES}
    parts = [_one(values, s) for values in s.values]
    return {name: over_slices(name, [part[name] for part in parts]) for name in NAMES}


def fit_bulk(values: Tensor, s: Spectrum) -> Bulk | str:
    """Noise fitted to falling singular values of a matrix of the shape of ``s``; or why it cannot be, in words."""
    if values.numel() < FEWEST:
        return f"{values.numel()} singular values are too few to fit noise to; it takes {FEWEST}"
    visible = int((values > s.resolution * values[0]).sum())
    if visible <= values.numel() // 2:
        return f"more than half of the singular values are zero (rank {visible}), so there is no bulk"
    top = noise_top(s.short, s.long) * (1 + 1 / s.short)
    spikes = 0
    seen: set[int] = set()
    while True:
        # The i-th of the p − k bulk values stands for the quantile of a whole noise matrix of p values, with the k
        # spikes taken away from the top: a signal of rank k leaves the rest as noise of (m − k) × (n − k).
        bulk = values[spikes:]
        aspect = (s.long - spikes) / (s.short - spikes)
        median = noise_median(s.short - spikes, s.long - spikes) * (s.long - spikes)
        scale = math.sqrt(float(bulk.square().quantile(0.5)) / median)
        found = int((values > scale * top).sum())
        if found == spikes or found in seen or values.numel() - found < FEWEST or len(seen) > _ROUNDS:
            break
        seen.add(found)
        spikes = found
    eigenvalues = bulk.square().flip(0) / (scale**2 * (s.long - spikes))
    law = noise_cdf(eigenvalues, aspect)
    steps = torch.arange(bulk.numel() + 1, dtype=torch.float64) / bulk.numel()
    distance = max(float((law - steps[:-1]).max()), float((steps[1:] - law).max()))
    return Bulk(scale, scale * top, spikes, distance)


def noise_of(bulk: Bulk, s: Spectrum) -> Tensor:
    """(p,) singular values, falling, that the fitted noise has on the whole."""
    return bulk.scale * noise_spectrum(s.short, s.long)


def _one(values: Tensor, s: Spectrum) -> dict[str, Finding]:
    bulk = fit_bulk(values, s)
    if isinstance(bulk, str):
        return {name: Finding(name=name, value=None, notes=(bulk,)) for name in NAMES}
    p = values.numel()
    energies = (values / values[0]).square()
    figures = {
        # Over draws of noise the standard deviation is 1.4/(p √aspect): measured from p = 16 to 256, aspect 1 to 8.
        "noise_scale": (bulk.scale, 2.8 * bulk.scale / (p * math.sqrt(s.aspect))),
        "noise_edge": (bulk.scale * noise_edges(s.short, s.long)[1], None),
        "spikes": (float(bulk.spikes), None),
        "spike_energy": (float(energies[: bulk.spikes].sum() / energies.sum()), None),
        "bulk_fit": (1 - bulk.distance, None),
    }
    return {name: Finding(name=name, value=value, uncertainty=width, n=p) for name, (value, width) in figures.items()}


def _run_claim() -> Verdict:
    """θ u vᵀ in noise of variance 1/n: seen at √((1 + θ²)(c + θ²))/θ where θ > c^¼, not at all below."""
    figures: dict[str, float] = {}
    held = True
    generator = torch.Generator().manual_seed(0)
    for aspect in (1, 2, 4, 8):
        m, n = 300, 300 * aspect
        noise = torch.randn(m, n, dtype=torch.float64, generator=generator) / math.sqrt(n)
        u, v = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (m, n))
        spike = torch.outer(u / u.norm(), v / v.norm())
        c = 1 / aspect
        for factor in (0.5, 1.5, 3.0):
            theta = factor * c**0.25
            s = singular_values(noise + theta * spike)
            found = marchenko_pastur(s)
            label = f"aspect {aspect}, {factor:g} × threshold"
            figures[f"{label}: spikes"] = float(found["spikes"])
            if factor > 1:
                predicted = math.sqrt((1 + theta**2) * (c + theta**2)) / theta
                figures[f"{label}: σ₁ / predicted"] = float(s.values[0, 0]) / predicted
                held = held and abs(figures[f"{label}: σ₁ / predicted"] - 1) < 0.03
            held = held and found["spikes"].value == (factor > 1)
    return Verdict(held=held, figures=figures)


METHOD = Diagnostic(
    name="marchenko-pastur",
    summary="noise fitted to the bulk of the spectrum, spikes above its edge, how well the bulk fits",
    group="weights",
    paper=Paper(
        authors="V. A. Marchenko, L. A. Pastur",
        title="Distribution of eigenvalues for some sets of random matrices",
        year=1967,
        link="https://doi.org/10.1070/SM1967v001n04ABEH001994",
    ),
    entry=marchenko_pastur,
    claim=Claim(
        statement="One direction of strength θ in noise is seen as one spike at the predicted place (within 3 %) for θ "
        "1.5 and 3 times (m/n)^¼ and not at all at half of it, at aspects 1, 2, 4, 8.",
        source="Benaych-Georges and Nadakuditi 2012, section 3.1: the phase transition of singular values",
        run=_run_claim,
    ),
)
