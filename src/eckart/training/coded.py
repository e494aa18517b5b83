"""The report on a model whose maps got coded weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CodedSite:
    """What became of one map."""

    name: str
    weights: int
    bits_before: int
    bits_after: int
    """As stored: codes in whole integers, levels in the model's dtype; biases left out of both."""
    error: float
    """tr(ΔW M ΔWᵀ) / tr(W M Wᵀ) with the metric M that the codes were fitted in."""


@dataclass(frozen=True, kw_only=True)
class CodedReport:
    """All of it: sizes over the coded maps only, never mixed with the rest of the model."""

    sites: tuple[CodedSite, ...]
    skipped: tuple[tuple[str, str], ...]
    """(map, reason) of those left dense."""

    @property
    def bits_before(self) -> int:
        return sum(site.bits_before for site in self.sites)

    @property
    def bits_after(self) -> int:
        return sum(site.bits_after for site in self.sites)

    @property
    def bits_per_weight(self) -> float:
        return self.bits_after / sum(site.weights for site in self.sites)
