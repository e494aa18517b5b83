"""Everything that a tier measures of one weight."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.inspection.record import Tier
from eckart.inspection.source import Entry
from eckart.linalg.noise import noise_spectrum
from eckart.records import Finding
from eckart.spectra import (
    Bulk,
    Spectrum,
    defects,
    difference,
    farms,
    fit_bulk,
    judge,
    marchenko_pastur,
    power_law,
    quick_norms,
    singular_values,
    spectrum,
)

MOST_PLACES = 200
"""Singular values that are kept of each spectrum."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one weight, without its name."""

    findings: Mapping[str, Finding]
    verdict: str = ""
    singular_values: tuple[float, ...] = ()
    places: tuple[int, ...] = ()
    noise: tuple[float, ...] = ()
    energy: tuple[float, ...] = ()
    equal: bool = False
    """Whether it equals the base, entry by entry."""
    seconds: float = field(default=0.0)


def measure(W: Tensor, entry: Entry, tier: Tier, base: Tensor | None = None) -> Measured:
    """The findings of ``tier`` for a weight, and of its difference to ``base`` of the same shape.

    ``quick``: norms by Lanczos, exponents by windows. ``standard``: exact spectra, noise, tails, defects. ``full``:
    also rows and columns that repeat up to a factor, and the overlaps of a difference.
    """
    start = time.perf_counter()
    kind, groups = entry.kind, entry.groups
    findings: dict[str, Finding] = {}
    shown = Measured(findings={})
    if tier == "quick":
        findings |= quick_norms(W, kind=kind, groups=groups) | farms(W, kind=kind, groups=groups)
    else:
        s = singular_values(W, kind=kind, groups=groups)
        windows = farms(W, kind=kind, groups=groups, spectrum=s)
        judged = judge(s, windows)
        findings |= spectrum(s) | marchenko_pastur(s) | windows | power_law(s) | {"verdict": judged}
        findings |= _defects(W, entry, tier)
        shown = _curve(s, str(judged.details.get("verdict", "")))
    equal = base is not None and W.dtype == base.dtype and torch.equal(W, base.to(W.device))
    if base is not None and not equal:
        findings |= difference(W, base, kind=kind, groups=groups, vectors=tier == "full")
    return Measured(
        findings=findings,
        verdict=shown.verdict,
        singular_values=shown.singular_values,
        places=shown.places,
        noise=shown.noise,
        energy=shown.energy,
        equal=equal,
        seconds=time.perf_counter() - start,
    )


def _defects(W: Tensor, entry: Entry, tier: Tier) -> dict[str, Finding]:
    found = defects(W, kind=entry.kind, groups=entry.groups)
    if tier == "full":
        scaled = defects(W, kind=entry.kind, groups=entry.groups, up_to_scale=True)
        for name in ("duplicate_rows", "duplicate_columns"):
            found[f"parallel_{name.removeprefix('duplicate_')}"] = scaled[name]
    return found


def _curve(s: Spectrum, verdict: str) -> Measured:
    """The spectrum at MOST_PLACES places; of a stack, the root mean square over its matrices."""
    if s.flaw:
        return Measured(findings={}, verdict=verdict)
    values = s.values.square().mean(0).sqrt()
    places = _places(values.numel())
    kept = values.square().cumsum(0)
    bulks = [bulk for row in s.values if isinstance(bulk := fit_bulk(row, s), Bulk)]
    noise: list[float] = []
    if len(bulks) == len(s.values):
        scale = (sum(bulk.scale**2 for bulk in bulks) / len(bulks)) ** 0.5
        noise = (scale * noise_spectrum(s.short, s.long)[places]).tolist()
    return Measured(
        findings={},
        verdict=verdict,
        singular_values=_rounded(values[places].tolist()),
        places=tuple(places),
        noise=_rounded(noise),
        energy=_rounded((kept[places] / kept[-1]).tolist()) if kept[-1] > 0 else (),
    )


def _places(p: int) -> list[int]:
    """At most 200 indices from 0 to p − 1: half of them at equal steps, half at equal ratios."""
    if p <= MOST_PLACES:
        return list(range(p))
    half = MOST_PLACES // 2
    even = torch.linspace(0, p - 1, half).round()
    ratios = torch.logspace(0, torch.tensor(float(p)).log10().item(), half).round() - 1
    return sorted({int(place) for place in torch.cat([even, ratios]).clamp(0, p - 1)})


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
