"""Numbers in few bits: what it costs a form, and the layers that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eckart.apply.prepare import PreparedSite
from eckart.arch import get_module
from eckart.compression import kfac
from eckart.compression.factorise import cut
from eckart.forms import LowRank, Pivoted
from eckart.layers import (
    FactoredLinear,
    NarrowColumns,
    NarrowRows,
    PivotedLinear,
    QuantisedLinear,
    quantise_layer,
)
from eckart.linalg import round_groups, weighted_factors
from eckart.moments import SiteMoments
from eckart.planning import Choices, Step, quantised_bytes, with_bits
from eckart.planning.curve import FORMS, INDEX_BYTES, Choice
from eckart.records import FormKind, Site, Size, Unit

GROUP = 128
"""Columns that share a scale."""
BITS = (8, 4)
"""What a budget in bytes may choose from, beside the numbers as they are."""
REPAIRS = (8, 16, 32, 64)
"""Ranks of a correction beside a weight in 4 bits."""
SAMPLES = 4
"""Ranks at which the loss of rounding is computed; between them it is interpolated."""


@dataclass(frozen=True, eq=False)
class Metric:
    """tr(G Δ Σ Δᵀ) of one map, in units of the loss."""

    second: Tensor
    gradient: Tensor
    scale: float
    raw: Tensor
    """E[x xᵀ], which rounding with feedback fits."""

    def loss(self, delta: Tensor) -> float:
        weighted = self.gradient[:, None] * delta if self.gradient.ndim == 1 else self.gradient @ delta
        moved = delta * self.second if self.second.ndim == 1 else delta @ self.second
        return max(float((weighted * moved).sum()), 0.0) * self.scale


def metric_of(weights: dict[str, Tensor], moments: SiteMoments, options: kfac.Options) -> Metric:
    """The metrics of ``kfac``."""
    second, gradient, _ = kfac.metrics(weights, moments, options)
    raw = second if moments.second is None else moments.second
    return Metric(second, gradient, moments.loss_scale, raw)


def quantisable(site: Site) -> bool:
    """Whether the layers of a site can hold integers."""
    return site.kind in ("linear", "conv1d") and site.slices == 1 and not site.tied


def site_bits(
    part: PreparedSite, choices: Choices, metric: Metric, bits: Sequence[int], bytes_per_number: int
) -> Choices:
    """The choices of a site, and each of them in few bits; a dense weight in 4 bits also with a repair."""
    site, weight = part.site, part.slices[0].weight.to("cpu", torch.float64)
    m, n = site.out_features, site.in_features
    found = [choices]
    for width in bits:
        noise = np.zeros(len(choices))
        size = np.zeros(len(choices), np.int64)
        for code, form in enumerate(FORMS):
            rows = np.flatnonzero(choices.form == code)
            if not len(rows) or form == "narrow":
                continue
            k = choices.rank[rows]
            if form == "dense":
                rounded = rounded_dense(weight, width, metric.raw)
                noise[rows] = metric.loss(weight - rounded)
                size[rows] = quantised_bytes(m, n, width, GROUP, bytes_per_number)
                if width <= 4:
                    found += _repaired(choices[rows[0].item()], choices.whole, site, weight - rounded, metric, width,
                                       bytes_per_number)  # fmt: skip
            else:
                noise[rows] = _noise(part, form, k, width, metric)
                size[rows] = factor_bytes(site, form, k, width, bytes_per_number)
        found.append(with_bits(choices, width, noise, size))
    return Choices.joined(found)


def factor_bytes(
    site: Site, form: FormKind, ranks: NDArray[np.int64], bits: int, bytes_per_number: int
) -> NDArray[np.int64]:
    """Bytes of both factors of a site in few bits, at every rank; of the pivoted form with its indices."""
    m, n = site.out_features, site.in_features
    rest, index = (m - ranks, m * 4) if form == "pivoted" else (np.full_like(ranks, m), 0)
    found: NDArray[np.int64] = (
        quantised_bytes(ranks, n, bits, GROUP, bytes_per_number)
        + quantised_bytes(rest, ranks, bits, GROUP, bytes_per_number)
        + index
    )
    return found


def flat_bits(site: Site, choices: Choices, bits: Sequence[int], bytes_per_number: int) -> Choices:
    """The choices of a site and each of them in few bits, before anything is known of what rounding loses."""
    found = [choices]
    for width in bits:
        size = np.zeros(len(choices), np.int64)
        for code, form in enumerate(FORMS):
            rows = np.flatnonzero(choices.form == code)
            if form == "dense":
                size[rows] = quantised_bytes(site.out_features, site.in_features, width, GROUP, bytes_per_number)
            elif len(rows):
                size[rows] = factor_bytes(site, form, choices.rank[rows], width, bytes_per_number)
        found.append(with_bits(choices, width, np.zeros(len(choices)), size))
    return Choices.joined(found)


def unit_bits(
    unit: Unit, choices: Choices, dense_noise: dict[int, float], bits: Sequence[int], bytes_per_number: int
) -> Choices:
    """The widths of a unit, and each of them in few bits; the loss of rounding falls with the width."""
    found = [choices]
    k = choices.rank
    index = np.where(choices.form == FORMS.index("narrow"), k * unit.width_indices * INDEX_BYTES, 0)
    for width in bits:
        shapes = [(k * rows, n) for rows, n in unit.width_rows] + [(m, k * each) for m, each in unit.width_columns]
        size = sum(quantised_bytes(m, n, width, GROUP, bytes_per_number) for m, n in shapes)
        found.append(with_bits(choices, width, k / unit.full_rank * dense_noise[width], size + index))
    return Choices.joined(found)


def dense_noises(weight: Tensor, metric: Metric, bits: Sequence[int]) -> dict[int, float]:
    """Loss of rounding a dense weight, by bits."""
    weight = weight.to("cpu", torch.float64)
    return {width: metric.loss(weight - rounded_dense(weight, width, metric.raw)) for width in bits}


def rounded_dense(weight: Tensor, bits: int, second: Tensor | None) -> Tensor:
    """The weight (out, in) on the grid that its layer will have, float64."""
    weight = weight.to("cpu", torch.float64)
    second = second if second is not None and second.ndim == 2 else None
    return round_groups(weight, bits=bits, group=GROUP, second=second).dense().to(torch.float64)


def _repaired(
    dense: Choice,
    whole: Size,
    site: Site,
    residual: Tensor,
    metric: Metric,
    bits: int,
    bytes_per_number: int,
) -> list[Choices]:
    """A dense weight in few bits with corrections of several ranks."""
    errors = weighted_factors(residual, metric.second, metric.gradient).errors
    found = []
    m, n = site.out_features, site.in_features
    for rank in REPAIRS:
        if rank * (m + n) >= m * n // 2:
            continue
        size = quantised_bytes(m, n, bits, GROUP, bytes_per_number) + rank * (m + n) * bytes_per_number
        one = Choices.of([dense], whole=whole)
        loss = np.array([float(errors[rank]) * metric.scale])
        found.append(with_bits(one, bits, loss, np.array([size]), repair=rank, numbers=rank * (m + n)))
    return found


def _noise(part: PreparedSite, form: str, ranks: NDArray[np.int64], bits: int, metric: Metric) -> NDArray[np.float64]:
    """Loss that rounding the factors adds at every rank, from a few of them."""
    picked = np.unique(ranks[np.linspace(0, len(ranks) - 1, SAMPLES).astype(int)])
    losses = []
    for rank in picked.tolist():
        made = cut(part.slices[0], rank, "pivoted" if form == "pivoted" else "lowrank")
        exact = made.dense().to("cpu", torch.float64)
        losses.append(metric.loss(exact - rounded_form(made, bits, metric.raw)))
    found: NDArray[np.float64] = np.interp(ranks, picked, losses)
    return found


def rounded_form(form: LowRank | Pivoted | object, bits: int, second: Tensor) -> Tensor:
    """The dense matrix (out, in) of two factors that are rounded one after the other, float64."""
    if not isinstance(form, (LowRank, Pivoted)):
        raise TypeError(type(form).__name__)
    a, b = form.a.to("cpu", torch.float64), form.b.to("cpu", torch.float64)
    a_ = rounded_dense(a, bits, second)
    b_ = rounded_dense(b, bits, a_ @ second @ a_.T) if b.numel() else b
    if isinstance(form, LowRank):
        return b_ @ a_
    return torch.cat([a_, b_ @ a_])[form.index.long().cpu()]


def dense_of(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a layer stands for."""
    found = layer.dense() if hasattr(layer, "dense") else layer.get_parameter("weight")  # type: ignore[operator]
    return (found.T if type(layer).__name__ == "Conv1D" else found).detach()


def quantise_site(model: nn.Module, name: str, step: Step, second: Tensor | None, metric: Metric | None = None) -> None:
    """Quantise the layer that stands under ``name`` now: itself, or the matrices inside of it, as ``step`` says.

    ``second`` is E[x xᵀ] of what it reads. A repair needs the ``metric`` under which it is best.
    """
    bits, group = step.bits, step.group
    layer = get_module(model, name)
    matrix = second if second is not None and second.ndim == 2 else None
    if isinstance(layer, (FactoredLinear, PivotedLinear)):
        quantise_layer(model, f"{name}.a", bits=bits, group=group, second=matrix)
        a = get_module(model, f"{name}.a")
        if layer.b.out_features:
            inner = None
            if matrix is not None and isinstance(a, QuantisedLinear):
                rows = a.dense().to("cpu", torch.float64)
                inner = rows @ matrix @ rows.T
            quantise_layer(model, f"{name}.b", bits=bits, group=group, second=inner)
    elif isinstance(layer, (NarrowRows, NarrowColumns)):
        quantise_layer(model, f"{name}.a", bits=bits, group=group, second=matrix)
    elif step.repair and metric is not None:
        _quantise_repaired(model, name, step, matrix, metric)
    else:
        quantise_layer(model, name, bits=bits, group=group, second=matrix)


def _quantise_repaired(model: nn.Module, name: str, step: Step, second: Tensor | None, metric: Metric) -> None:
    layer = get_module(model, name)
    stored = layer.get_parameter("weight").detach()
    weight = stored.T if type(layer).__name__ == "Conv1D" else stored
    rounded, rank = round_groups(weight, bits=step.bits, group=step.group, second=second), step.repair
    residual = weight.to("cpu", torch.float64) - rounded.dense().to("cpu", torch.float64)
    factors = weighted_factors(residual, metric.second, metric.gradient)
    left, right = factors.left[:, :rank], factors.right[:rank]
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).sqrt()
    pair = ((right / scale[:, None]).to(weight.dtype), (left * scale).to(weight.dtype))
    new = QuantisedLinear.from_linear(layer, rounded, repair=pair)
    parent, _, child = name.rpartition(".")
    setattr(get_module(model, parent), child, new)
