"""One unit, its moments and a way of scoring in; everything that its widths need out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.arch import MLP, Attention
from eckart.compression import kfac
from eckart.compression.needs import needed
from eckart.errors import InputError
from eckart.linalg import symmetric_root
from eckart.modules.heads import PreparedHeads, group_columns, removal_order_of_groups
from eckart.modules.method import PreparedUnit
from eckart.modules.neurons import (
    PreparedNeurons,
    errors_in_order,
    errors_without_refit,
    leverage_order,
    removal_order,
)
from eckart.modules.queries import PreparedQueries, directions, pair_scores
from eckart.modules.units import UnitFacts
from eckart.modules.values import PreparedValues, picked_heads, value_bases
from eckart.moments import SiteMoments

Weights = Mapping[str, Mapping[str, Tensor]]
"""Site name → {"weight": (out, in), "bias": (out,)}."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a method makes of the moments."""

    metric: kfac.Options
    gradients: bool
    """Whether outputs are weighed by their gradients, so that errors are rises of the loss."""
    leverage: float | None = None
    """Ridge of the leverage scores of neurons; None for the scores of optimal brain surgery."""
    equal_heads: bool = False
    refit: bool = True
    """Of neurons and heads: whether the map that reads them is fitted to those that stay."""


def prepare_unit(unit: UnitFacts, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores) -> PreparedUnit:
    """Order what can be dropped and say what it costs.

    ``moments`` holds those of the down (or output) map, and for queries those of the query and the key map.
    Raises InputError where a moment is missing.
    """
    facts = unit.facts
    if isinstance(facts, MLP):
        return _neurons(unit, facts, weights, moments, scores)
    if unit.unit.kind == "heads":
        return _heads(unit, facts, weights, moments, scores)
    if unit.unit.kind == "values":
        return _values(unit, facts, weights, moments, scores)
    return _queries(unit, facts, weights, moments, scores)


def _metrics(
    name: str, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ, the root R of loss scale · G (None without gradients), and the mean of what the bias takes up."""
    if name not in moments:
        raise InputError(f"{name}: the moments lack this site, which a narrower module needs. Calibrate again.")
    known = moments[name]
    if not scores.gradients:
        return needed(known, "second", "modegpt"), None, None
    second, gradient, mean = kfac.metrics(weights[name], known, scores.metric)
    return second, _root(gradient * known.loss_scale), mean


def _root(gradient: Tensor) -> Tensor:
    """R with RᵀR = G (m, m), or a diagonal (m,)."""
    return symmetric_root(gradient)[0]


def _seen(root: Tensor | None, weight: Tensor) -> Tensor:
    """R W."""
    weight = weight.to("cpu", torch.float64)
    if root is None:
        return weight
    return root[:, None] * weight if root.ndim == 1 else root @ weight


def _neurons(
    unit: UnitFacts, mlp: MLP, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores
) -> PreparedNeurons:
    second, root, mean = _metrics(mlp.down, weights, moments, scores)
    target = _seen(root, weights[mlp.down]["weight"])
    order = removal_order(target, second) if scores.leverage is None else leverage_order(second, scores.leverage)
    return PreparedNeurons(
        unit=unit.unit,
        mlp=mlp,
        weights=weights,
        second=second,
        mean=mean,
        order=order,
        errors=(errors_in_order if scores.refit else errors_without_refit)(target, second, order),
        refit=scores.refit,
    )


def _values(
    unit: UnitFacts, attention: Attention, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores
) -> PreparedValues:
    second, root, mean = _metrics(attention.output, weights, moments, scores)
    target = _seen(root, weights[attention.output]["weight"])
    bases, gains = value_bases(target, second, attention)
    picked, errors = picked_heads(gains, attention.head_dim, scores.equal_heads)
    return PreparedValues(
        unit=unit.unit,
        attention=attention,
        weights=weights,
        second=second,
        mean=mean,
        bases=tuple(bases),
        picked=picked,
        errors=errors,
    )


def _heads(
    unit: UnitFacts, attention: Attention, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores
) -> PreparedHeads:
    second, root, mean = _metrics(attention.output, weights, moments, scores)
    target = _seen(root, weights[attention.output]["weight"])
    groups = group_columns(attention)
    order = removal_order_of_groups(target, second, groups)
    columns = torch.cat([groups[i] for i in order])
    errors = (errors_in_order if scores.refit else errors_without_refit)(target, second, columns)
    return PreparedHeads(
        unit=unit.unit,
        attention=attention,
        weights=weights,
        second=second,
        mean=mean,
        order=order,
        errors=errors[:: len(groups[0])],
        refit=scores.refit,
    )


def _queries(
    unit: UnitFacts, attention: Attention, weights: Weights, moments: Mapping[str, SiteMoments], scores: Scores
) -> PreparedQueries:
    sides = []
    for rows in (attention.query, attention.key):
        known = moments.get(rows.site)
        if known is None:
            raise InputError(f"{rows.site}: the moments lack this site, which a narrower module needs.")
        part = slice(rows.start, rows.stop)
        map_ = {name: tensor[part].to("cpu", torch.float64) for name, tensor in weights[rows.site].items()}
        outputs = _output_second(map_, known)
        if scores.gradients:
            gradient = kfac.output_metric(weights[rows.site]["weight"].shape[0], known, 0.0) * known.loss_scale
            gradient = gradient[part, part] if gradient.ndim == 2 else torch.diag(gradient[part])
        else:
            gradient = torch.eye(len(outputs), dtype=torch.float64)
        sides.append((gradient, outputs))
    bases = None
    if attention.rotary:
        found = pair_scores(attention, sides[0], sides[1])
    else:
        found, bases = directions(attention, sides[0])
    if scores.equal_heads:
        found = _in_turn(found)
    errors = torch.zeros(unit.unit.full_rank + 1, dtype=torch.float64)
    place = 0
    left = sum(loss for loss, _ in found)
    errors[0] = left
    for loss, (_, *coordinates) in found:
        left -= loss
        for _ in coordinates:
            place += 1
            errors[place] = max(left, 0.0)
    return PreparedQueries(
        unit=unit.unit,
        attention=attention,
        weights=weights,
        picked=tuple(item for _, item in found),
        bases=None if bases is None else tuple(bases),
        errors=errors,
    )


def _in_turn(found: list[tuple[float, tuple[int, ...]]]) -> list[tuple[float, tuple[int, ...]]]:
    """The first of every head, then the second of every head, …"""
    seen: dict[int, int] = {}
    keyed = []
    for item in found:
        head = item[1][0]
        seen[head] = seen.get(head, 0) + 1
        keyed.append((seen[head], head, item))
    return [item for _, _, item in sorted(keyed, key=lambda entry: entry[:2])]


def _output_second(map_: Mapping[str, Tensor], moments: SiteMoments) -> Tensor:
    """E[y yᵀ] of y = W x + b from the moments of x."""
    weight, bias = map_["weight"], map_.get("bias")
    outputs: Tensor = weight @ needed(moments, "second", "modules") @ weight.T
    if bias is not None and moments.mean is not None:
        mean = weight @ moments.mean
        outputs = outputs + mean.outer(bias) + bias.outer(mean) + bias.outer(bias)
    return outputs
