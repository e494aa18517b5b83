"""The frozen records that travel between rooms. Plain data: importing this file imports no torch."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eckart.errors import InputError

SiteKind = Literal["linear", "conv1d", "conv", "embedding", "experts"]
FormKind = Literal["dense", "lowrank", "pivoted", "narrow", "sparse"]
UnitKind = Literal["neurons", "values", "queries", "heads"]

Progress = Callable[[str, int, int], None]
"""Told ``(stage, done, total)`` as long work goes on."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of someone who does not want to hear of it."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    year: int
    link: str = ""

    def __str__(self) -> str:
        return f"{self.authors}, “{self.title}”, {self.year}"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One linear map of a model, as a stack of ``slices`` matrices of shape (out_features, in_features).

    A map is one matrix; a grouped convolution has one slice per group, a fused mixture-of-experts
    parameter one per expert. An embedding table E (entries × width) is the map Eᵀ: ``out_features``
    is the width and ``in_features`` the number of entries.
    """

    name: str
    """Dotted path of the module; for fused experts, of the parameter."""
    kind: SiteKind
    out_features: int
    in_features: int
    slices: int = 1
    bias: bool = False
    role: str = ""
    """What the map does in its block, the path below the block: ``attention.self.query``."""
    depth: int | None = None
    """Index of the repeated block that holds it; None outside of the blocks."""
    tied: tuple[str, ...] = ()
    """Names of other modules that share this weight."""

    @property
    def weight_parameters(self) -> int:
        """Entries of the weight, biases left out."""
        return self.slices * self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Maps that become narrower together: the neurons of an MLP, the values, the queries or the heads of an attention.

    A unit of width k keeps k of its ``full_rank`` neurons (or directions of the values, coordinates of queries
    and keys, or heads of keys and values with all that reads them), and every one of them costs the same.
    """

    name: str
    """Dotted name of the module, and the kind: ``encoder.layer.0.attention.self#values``."""
    kind: UnitKind
    sites: tuple[str, ...]
    """The maps that change."""
    full_rank: int
    """Its width as it is."""
    step: int = 1
    """What widths are multiples of; 2 for queries and keys with rotary positions, where pairs stay whole."""
    width_parameters: int
    """Entries of all maps together per unit of width."""
    width_indices: int
    """Stored positions per unit of width."""
    width_rows: tuple[tuple[int, int], ...] = ()
    """(rows per unit of width, in-features) of the maps that lose rows."""
    width_columns: tuple[tuple[int, int], ...] = ()
    """(out-features, columns per unit of width) of the maps that lose columns."""
    role: str = ""
    depth: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A rank, given in exactly one of three ways."""

    keep: int | None = None
    """How many directions are kept, at least 1."""
    ratio: float | None = None
    """Share of the dense parameters that the two factors may take, in (0, 1]."""
    energy: float | None = None
    """Share of the objective that is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise InputError(f"a Rank needs exactly one of keep, ratio, energy; got {given or 'none'}.")
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise InputError(f"Rank(keep=…) counts directions, an int of at least 1; got {self.keep!r}.")
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"Rank({name}=…) is a share in (0, 1]; got {value!r}.")


BUDGET_WORDS: dict[str, str] = {
    "keep": "share of the parameters of the compressed sites",
    "model_keep": "share of the parameters of the whole model",
    "parameters": "parameters of the whole model",
    "bytes": "bytes of the whole model's weights",
    "macs": "multiply-adds per token of the compressed sites",
    "loss": "ceiling on the predicted rise of the loss",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the compressed model may cost, given in exactly one unit. It is met from below."""

    keep: float | None = None
    """Share kept of the parameters of the compressed sites, in (0, 1]."""
    model_keep: float | None = None
    """Share kept of the parameters of the whole model, in (0, 1]."""
    parameters: int | None = None
    """Parameters of the whole model."""
    bytes: int | None = None
    """Bytes of all weights of the whole model as saved."""
    macs: int | None = None
    """Multiply-adds per token (per output position for convolutions) of the compressed sites."""
    loss: float | None = None
    """Ceiling on the predicted rise of the loss; the smallest model under it is chosen."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise InputError(
                f"a Budget needs exactly one of {', '.join(BUDGET_WORDS)}; got {', '.join(given) or 'none'}."
            )
        value = getattr(self, given[0])
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise InputError(f"Budget({given[0]}=…) is a positive number; got {value!r}.")
        if given[0] in ("keep", "model_keep") and value > 1:
            raise InputError(f"Budget({given[0]}=…) is a share in (0, 1]; got {value!r}. For 60 % write 0.6.")

    @property
    def unit(self) -> str:
        """The name of the field that is set."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> float:
        return float(getattr(self, self.unit))

    def __str__(self) -> str:
        return f"{self.unit} {getattr(self, self.unit)} ({BUDGET_WORDS[self.unit]})"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What weights cost."""

    parameters: int
    bytes: int
    macs: int
    """Multiply-adds per token (per output position for convolutions)."""

    def __add__(self, other: Size) -> Size:
        return Size(
            parameters=self.parameters + other.parameters,
            bytes=self.bytes + other.bytes,
            macs=self.macs + other.macs,
        )


@dataclass(frozen=True)
class Verdict:
    """What a claim's run found."""

    held: bool
    figures: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's own ordering or figure, in miniature, that one command can check."""

    statement: str
    """What should come out, in one sentence with its numbers."""
    source: str
    """Where the paper says so."""
    run: Callable[[], Verdict]
    """Runs in seconds, on seeds that were not chosen for the outcome."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measured figure of a tensor, a model or a data set, with how sure it is."""

    name: str
    """What was measured, in snake case: ``stable_rank``."""
    value: float | None
    """None where it cannot be measured on this input; ``notes`` says why."""
    uncertainty: float | None = None
    """Half width of a 95 % interval in the units of ``value``; 0: exact up to rounding; None: not known."""
    n: int | None = None
    """How many samples (entries, eigenvalues, points, probes) it rests on."""
    unit: str = ""
    at_least: bool = False
    """The true value lies at ``value`` or above, as where an estimator saturates."""
    notes: tuple[str, ...] = ()
    """What a reader must know: what was dropped, where an assumption fails."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain data behind the figure, such as a curve: numbers, texts, lists and mappings of them."""

    def __float__(self) -> float:
        """The value; NaN where there is none."""
        return math.nan if self.value is None else float(self.value)

    def __str__(self) -> str:
        if self.value is None:
            shown = "not measured"
        else:
            shown = f"{'≥ ' if self.at_least else ''}{self.value:.4g}"
            if self.uncertainty:
                shown += f" ± {self.uncertainty:.2g}"
            if self.unit:
                shown += f" {self.unit}"
        rest = [f"n = {self.n}"] if self.n is not None else []
        return f"{self.name}: {shown}" + (f" ({'; '.join([*rest, *self.notes])})" if rest or self.notes else "")

    def _repr_html_(self) -> str:
        """The line for notebooks, with its notes below."""
        first, *_ = str(replace(self, notes=())).splitlines()
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<div>{html.escape(first)}{f'<ul>{notes}</ul>' if notes else ''}</div>"

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {f.name: as_plain(getattr(self, f.name)) for f in fields(self)}


DiagnosticGroup = Literal["weights", "landscape", "data", "representations", "certificates"]


@dataclass(frozen=True, kw_only=True)
class Technique:
    """An optimizer, a pruning or a training method, as a value for tables, docs and claims."""

    name: str
    summary: str
    paper: Paper
    entry: Callable[..., Any]
    """The public class or function, such as ``TrainedRankPruning``."""
    claim: Claim


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A way to measure something, as a value for tables, docs and claims; ``entry`` is what people call."""

    name: str
    summary: str
    group: DiagnosticGroup
    paper: Paper
    entry: Callable[..., Any]
    """The public function, such as ``eckart.geometry.two_nn``; it takes tensors and gives a Finding or several."""
    claim: Claim


def as_plain(value: Any) -> Any:
    """Dataclasses and mappings become objects, sets sorted lists, paths text, NaN and infinity null.

    Raises TypeError for anything else that JSON does not know, a tensor or a function.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((as_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    raise TypeError(f"expected plain data; got {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class LayerOutcome:
    """What happened to one site."""

    site: Site
    form: FormKind
    rank: int
    """Kept directions; ``full_rank`` where the site stays dense."""
    before: Size
    after: Size
    predicted: float
    """Relative error of the method's objective on the calibration data (0 … 1); 0 for dense."""
    held_out: float | None = None
    """The same, fitted on half A and measured on half B; None where there are no moments."""
    loss: float | None = None
    """Predicted rise of the loss, where the method's objective is in units of the loss."""
    bits: int = 0
    """Bits per number; 0: as the model stores them."""
    repair: int = 0
    """Rank of the correction beside a quantised weight."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a compression did, all of it: sizes over the sites and over the whole model, never mixed."""

    layers: tuple[LayerOutcome, ...]
    sites_before: Size
    sites_after: Size
    model_before: Size
    model_after: Size
    predicted_loss: float | None
    """Sum over the layers, or what probes measured on calibration data with all of them replaced."""
    method: str
    budget: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval and what it was measured on."""

    mean: float
    low: float
    high: float
    n: int
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median seconds of a forward pass, model against base, interleaved in one run."""

    batch: int
    length: int
    model: float
    base: float

    @property
    def speedup(self) -> float:
        return self.base / self.model


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model measured against its original."""

    task: Literal["embedding", "causal-lm", "masked-lm", "logits"]
    metrics: Mapping[str, Interval]
    """Named figures: ``cosine``, ``neighbours@10``, ``rank_correlation``; ``bits_per_byte``,
    ``bits_per_byte_base``, ``loss_rise`` (nats per token), ``kl`` (nats per token) …"""
    protocol: Mapping[str, Any]
    """What the figures mean: data, its hash, window, stride, unit, tokenizer."""
    model_size: Size
    base_size: Size
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """``model`` and ``base``: bytes of the weight files, where they lie on disk."""
    latency: tuple[Latency, ...] = ()
    warnings: tuple[str, ...] = ()
