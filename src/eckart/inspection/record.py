"""The records of an inspection: what is known of each matrix, what follows from it, what else was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eckart.records import Finding

Tier = Literal["quick", "standard", "full"]
Severity = Literal["broken", "warning", "advice", "good"]


@dataclass(frozen=True, kw_only=True)
class MatrixFacts:
    """One weight and all that was measured of it. A weight that was not measured says why; none is left out."""

    name: str
    """Name of the tensor, as in the file or in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    """As stored."""
    out_features: int = 0
    in_features: int = 0
    slices: int = 1
    """Matrices that the tensor holds: experts, positions of a convolution kernel."""
    dtype: str
    parameters: int
    bytes: int
    role: str = ""
    """What it does in its block: ``attention.self.query``."""
    depth: int | None = None
    """Index of its block; None outside of the blocks."""
    skipped: str = ""
    """Empty, or why nothing was measured: “1-D: no spectrum”, “int8: quantised”."""
    findings: Mapping[str, Finding] = field(default_factory=dict)
    """By name: ``stable_rank``, ``rank_95``, ``spikes`` …; see :mod:`eckart.spectra`."""
    singular_values: tuple[float, ...] = ()
    """At most 200 of them, falling, at the places ``places``."""
    places: tuple[int, ...] = ()
    """Index (0-based) of each entry of ``singular_values`` in the whole spectrum."""
    noise: tuple[float, ...] = ()
    """What pure noise of the same shape and of the fitted bulk's size has at the same places; empty where not
    fitted.
    """
    energy: tuple[float, ...] = ()
    """Share of the squared norm in the directions up to and with each place."""
    seconds: float = 0.0
    verdict: str = ""
    """What kind of spectrum it is, in a word of :func:`eckart.spectra.verdict`; empty where there is none."""
    base: str = ""
    """Why it was not compared with the base, or “equal”; empty where it was compared, and without a base."""
    tied: bool = False
    """Whether it is a tensor that another name holds too; ``parameters`` and ``bytes`` are then 0."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One sentence about the model, with its number, its reason and the command to run next."""

    severity: Severity
    claim: str
    """The sentence: “`layers.0.attn.o`: 98 % of the bulk fits noise.”"""
    number: str
    """The figure behind it, in words with units: “MP edge 3.1, 4 spikes”."""
    why: str
    """What it means, in plain words."""
    command: str = ""
    """What to run next; empty where nothing follows."""
    matrices: tuple[str, ...] = ()
    """The weights that it speaks of."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A measurement beyond the weights, shown only where it was made."""

    title: str
    words: str
    """What it says and what not, in plain words."""
    findings: tuple[Finding, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Named lines of (x, y)."""
    x: str = ""
    y: str = ""
    """Axis labels, with units."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A look at one model, or at one against another."""

    title: str
    source: str
    tier: Tier
    matrices: tuple[MatrixFacts, ...]
    """Every tensor that was found, in the order of the model; the skipped ones too."""
    observations: tuple[Observation, ...]
    """By severity, the worst first; the page shows seven at most and says how many more there are."""
    panels: tuple[Panel, ...] = ()
    base: str = ""
    """What it was compared with; the findings of the difference begin with ``delta_``."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """File, hash, version, date, seconds, command line."""
