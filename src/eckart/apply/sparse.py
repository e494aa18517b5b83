"""Maps with zeros that are not stored: what they cost and lose at some shares, and the layers that hold them.

MiniLM in float32, its maps in half of their bytes, numbers as they are: cosine .916 with sparse maps among the forms
(16 of 36 became sparse), .897 without. They save bytes only. Keeping n of m costs what as many weights anywhere in the
row do and loses more, so no budget chooses it; a plan may ask for it (``of``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.apply.bits import GROUP, metric_of
from eckart.apply.error import relative_error
from eckart.arch import get_module, set_module
from eckart.compression import kfac
from eckart.layers import SparseLinear
from eckart.linalg import round_groups
from eckart.moments import SiteMoments
from eckart.planning import Choice, Choices, Step, quantised_bytes
from eckart.prune.patterns import NofM, Row
from eckart.prune.refit import ITERATIONS, corrected_bias, refit
from eckart.prune.wanda import wanda_scores
from eckart.records import Site, Size

KEEPS = (0.3, 0.4, 0.5, 0.6, 0.75)
"""Shares of every row that a planner may keep. Below, ranks and fewer bits lose less."""
CURVE_ITERATIONS = 10
"""Of the refit where only its loss is wanted; what is written gets the default."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A map with zeros, fitted."""

    weight: Tensor
    """S (out, in) in the dtype of the map."""
    mask: Tensor
    bias: Tensor | None
    """None where the map has none."""

    def values(self) -> Tensor:
        """(out, kept)."""
        return self.weight[self.mask].reshape(len(self.mask), -1)


def kept_counts(site: Site) -> list[int]:
    """Weights of a row that stay, at the shares of :data:`KEEPS`."""
    return sorted({max(1, int(keep * site.in_features)) for keep in KEEPS})


def sparse_size(site: Site, kept: int, bits: int, bytes_per_number: int) -> Size:
    """One bit per weight, and the values that stay; multiply-adds as in the dense map."""
    m, n = site.out_features, site.in_features
    values = quantised_bytes(m, kept, bits, GROUP, bytes_per_number) if bits else m * kept * bytes_per_number
    return Size(parameters=m * kept, bytes=m * -(-n // 8) + int(values), macs=m * n)


def fitted(
    weights: Mapping[str, Tensor], moments: SiteMoments, kept: int, of: int = 0, iterations: int = ITERATIONS
) -> Fit:
    """Keep ``kept`` weights of every row (or, with ``of``, as many of every ``of`` neighbours) and refit them.

    Chosen by |w_ij| Σ_jj^½, fitted under Σ, both as ``kfac`` has them; the bias takes up the mean.
    """
    weight, bias = weights["weight"], weights.get("bias")
    second, _, mean = kfac.metrics(weights, moments, kfac.Options())
    n = weight.shape[1]
    scores = wanda_scores(weight, second)
    mask = NofM(kept * of // n, of).mask(scores) if of else Row().mask(scores, (kept + 0.5) / n if kept < n else 1.0)
    S = refit(weight, mask, second, iterations=iterations)
    if bias is not None and mean is not None:
        bias = corrected_bias(weight, S, bias, mean)
    return Fit(S, mask, bias)


def rounded_fit(fit: Fit, bits: int, group: int = GROUP) -> Tensor:
    """S (out, in), float64, with its values on the grid that its layer will have."""
    rounded = round_groups(fit.values(), bits=bits, group=group).dense().to(torch.float64)
    return rounded.new_zeros(fit.weight.shape).masked_scatter(fit.mask, rounded)


def sparse_choices(
    site: Site,
    weights: Mapping[str, Tensor],
    moments: SiteMoments,
    bits: Sequence[int],
    bytes_per_number: int,
    whole: Size,
) -> Choices:
    """A site with zeros at every share, its values as they are and in few bits; losses are those of the refit."""
    metric = metric_of(dict(weights), moments, kfac.Options())
    exact = weights["weight"].to("cpu", torch.float64)
    found = []
    for kept in kept_counts(site):
        fit = fitted(weights, moments, kept, iterations=CURVE_ITERATIONS)
        found.append(
            Choice(
                "sparse",
                kept,
                sparse_size(site, kept, 0, bytes_per_number),
                metric.loss(exact - fit.weight.to("cpu", torch.float64)),
            )
        )
        for width in bits:
            size = sparse_size(site, kept, width, bytes_per_number)
            found.append(Choice("sparse", kept, size, metric.loss(exact - rounded_fit(fit, width)), width))
    return Choices.of(found, whole=whole)


def flat_sparse(site: Site, bits: Sequence[int], bytes_per_number: int, whole: Size) -> Choices:
    """The same before anything is known of what is lost: the share that goes."""
    found = []
    for kept in kept_counts(site):
        loss = 1 - kept / site.in_features
        for width in (0, *bits):
            found.append(Choice("sparse", kept, sparse_size(site, kept, width, bytes_per_number), loss, width))
    return Choices.of(found, whole=whole)


def held_out_sparse(weights: Mapping[str, Tensor], half_a: SiteMoments, half_b: SiteMoments, step: Step) -> float:
    """The relative error on half B of what half A alone would have given."""
    fit = fitted(weights, half_a, step.rank, step.of)
    S = rounded_fit(fit, step.bits, step.group) if step.bits else fit.weight
    return relative_error(weights["weight"], S, half_b, centred="bias" in weights)


def make_sparse(model: nn.Module, site: Site, step: Step, weights: Mapping[str, Tensor], moments: SiteMoments) -> None:
    """Put the layer that a step asks for into the place of a map."""
    fit = fitted(weights, moments, step.rank, step.of)
    values = round_groups(fit.values(), bits=step.bits, group=step.group) if step.bits else fit.values()
    new = SparseLinear.from_linear(get_module(model, site.name), values, fit.mask, fit.bias)
    new.unpack()
    set_module(model, site.name, new)
