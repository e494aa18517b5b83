r"""Norms and ranks of a weight from its exact spectrum.

*What it does.* Says how large a weight is and how many directions it really uses, by the measures that papers
quote, and how many it takes to keep 90, 95 or 99 % of its squared norm, beside the rank at which two factors
take as many numbers as the weight itself.

*Formula.* λ = σ², falling, p = min(m, n) of them. ‖W‖_F = √Σλ, ‖W‖₂ = σ₁; stable rank Σλ/λ₁; participation ratio
(Σλ)²/Σλ²; effective rank exp(−Σ p_i ln p_i) with p = σ/Σσ (``effective_rank``, Roy and Vetterli's) and with p = λ/Σλ
(``effective_rank_energy``); ``rank_90`` is the least r with Σ_{i≤r} λ_i ≥ 0.9 Σλ; break-even rank mn/(m + n);
``numerical_rank`` counts σ above the resolution; condition number σ₁/σ_p. For all but the last:
stable rank ≤ participation ratio ≤ effective_rank_energy ≤ effective_rank ≤ numerical rank.

*Cost.* That of the spectrum: m² n multiply-adds for the Gram matrix of the smaller side m and 4/3 m³ for its
eigenvalues, 8.5 s of one core for 4096 × 4096 in float64; see ``benchmarks/inspect_weights.py``.

*When it does not help.* Energy is not accuracy: 95 % of the squared norm of the weight says little about the output,
which also depends on the inputs (``eckart compress`` measures those). A wide flat spectrum, as noise has, scores a high
effective rank and is not for that reason rich: see :func:`eckart.spectra.marchenko_pastur`.

*Departs from the paper in.* Roy and Vetterli define the effective rank with σ; much later work means λ, and the two
differ by a factor of two on ordinary weights. Both are given. The condition number of a matrix whose last
value is below the resolution of the Gram matrix (4e-8 σ₁ in float64) is a lower bound and says so.

*Reference.* O. Roy, M. Vetterli, “The effective rank: a measure of effective dimensionality”, 2007; stable rank:
M. Rudelson, R. Vershynin, “Sampling from large matrices: an approach through geometric functional analysis”, 2007.

*Example.*

>>> import torch
>>> found = spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))
>>> tuple(round(found[name].value, 3) for name in ("frobenius", "stable_rank", "effective_rank", "rank_95"))
(3.742, 1.556, 2.749, 3.0)
>>> print(found["condition_number"])
condition_number: ≥ 2.373e+07 (n = 4; the least singular value is below the resolution of the Gram matrix)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eckart.evidence import learned_problem
from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.values import Spectrum, over_slices, singular_values

ENERGIES = (0.90, 0.95, 0.99)
"""Shares of the squared norm whose ranks are given."""

NAMES = (
    "frobenius",
    "spectral_norm",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "effective_rank_energy",
    *(f"rank_{round(100 * energy)}" for energy in ENERGIES),
    "break_even_rank",
    "numerical_rank",
    "condition_number",
)
"""The findings of :func:`spectrum`."""


def spectrum(W: Tensor | Spectrum, *, kind: SiteKind | None = None, groups: int = 1) -> dict[str, Finding]:
    """Norms and ranks of a weight (out, in), or of each matrix of a stack, by name: ``NAMES`` of its module.

    All are exact up to rounding (uncertainty 0). A stack of matrices gives means, with the values of each in
    ``details["slices"]``. Where something has no value, as the stable rank of zeros, the Finding is None and says why.
    Raises InputError for tensors that are no weights: see :func:`eckart.spectra.singular_values`.
    """
    s = singular_values(W, kind=kind, groups=groups)
    if s.flaw:
        return {name: Finding(name=name, value=None, notes=(s.flaw,)) for name in NAMES}
    parts = [_one(values, s) for values in s.values]
    return {name: over_slices(name, [part[name] for part in parts]) for name in NAMES}


def energy_rank(values: Tensor, energy: float) -> int:
    """The least r with Σ_{i≤r} σ_i² ≥ ``energy`` · Σ σ_i² for falling σ; 0 for zeros."""
    kept = values.square().cumsum(0)
    if kept.numel() == 0 or not kept[-1] > 0:
        return 0
    return min(int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1, values.numel())


def entropy_rank(weights: Tensor) -> float:
    """exp of the entropy of ``weights`` ≥ 0 normalised to sum 1."""
    p = weights / weights.sum()
    return float(torch.special.entr(p).sum().exp())


def _one(values: Tensor, s: Spectrum) -> dict[str, Finding]:
    top = float(values[0])
    scaled = values / top if top > 0 else values  # squares of very large or small values stay finite
    energies = scaled.square()
    figures: dict[str, float | None] = {
        "frobenius": top * math.sqrt(float(energies.sum())),
        "spectral_norm": top,
        "break_even_rank": s.out_features * s.in_features / (s.out_features + s.in_features),
        "numerical_rank": float((scaled > s.resolution).sum()),
    }
    if top > 0:
        figures |= {
            "stable_rank": float(energies.sum()),
            "participation_ratio": float(energies.sum() ** 2 / energies.square().sum()),
            "effective_rank": entropy_rank(scaled),
            "effective_rank_energy": entropy_rank(energies),
            "condition_number": 1 / max(float(scaled[-1]), s.resolution),
            **{f"rank_{round(100 * energy)}": float(energy_rank(scaled, energy)) for energy in ENERGIES},
        }
    found = {}
    for name in NAMES:
        value = figures.get(name)
        at_least = name == "condition_number" and value is not None and float(scaled[-1]) <= s.resolution
        notes = ("all entries are zero",) if value is None else ()
        if at_least:
            notes = ("the least singular value is below the resolution of the Gram matrix",)
        known = None if value is None or at_least else 0.0
        found[name] = Finding(
            name=name, value=value, uncertainty=known, n=values.numel(), at_least=at_least, notes=notes
        )
    return found


def _run_claim() -> Verdict:
    problem = learned_problem()
    figures: dict[str, float] = {}
    held = True
    for name in ("mix", "up", "down", "head"):
        W = problem.weights(name)["weight"]
        found = spectrum(W)
        erank, rank = float(found["effective_rank"]), float(found["numerical_rank"])
        figures |= {f"{name}: effective rank": erank, f"{name}: rank": rank}
        held = held and 1 <= erank < rank
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 64, 24, dtype=torch.float64, generator=generator)
    large, small = torch.linalg.qr(draws).Q
    equal = float(spectrum(large)["effective_rank"])
    nearly = float(spectrum(torch.cat([large, 1e-3 * small], dim=1))["effective_rank"])
    figures |= {"24 equal values: effective rank": equal, "and 24 of a thousandth: effective rank": nearly}
    return Verdict(held=held and abs(equal - 24) < 1e-6 and nearly < 24.5, figures=figures)


METHOD = Diagnostic(
    name="spectrum",
    summary="norms, stable, effective and participation rank, ranks at 90/95/99 % energy, condition number",
    group="weights",
    paper=Paper(
        authors="O. Roy, M. Vetterli",
        title="The effective rank: a measure of effective dimensionality",
        year=2007,
        link="https://infoscience.epfl.ch/handle/20.500.14299/8951",
    ),
    entry=spectrum,
    claim=Claim(
        statement="The effective rank lies between 1 and the rank on learned maps, equals the rank where all singular "
        "values are equal, and hardly counts as many more of a thousandth of their size, which double the rank.",
        source="Roy and Vetterli 2007: properties 1 to 3 of the effective rank, and the introduction",
        run=_run_claim,
    ),
)
