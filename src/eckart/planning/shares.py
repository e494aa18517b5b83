"""Ranks from shares: the same share of every site, or shares that differ within groups of like sites.

*Formula (type-wise).* Yang et al., “SVD-LLM V2”, 2025 (arXiv 2503.12340): within a group g of sites of equal role,
at overall reduction R, site i is reduced by

    R_i = |g| R (1 / log L_i) / Σ_j (1 / log L_j)

where L_i is its truncation loss at the reduction R.

*Departs from the paper in.* log L depends on the unit of L, and is zero or negative for small losses, where
the formula breaks down. Here L_i is divided by the least loss of its group and multiplied by e, so that log L_i
= 1 + log(L_i / min L) ≥ 1 in every unit. R_i above 1 is cut to 1, and R then moves until the budget is met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eckart.planning.curve import Curve
from eckart.planning.frontier import Floats, Frontier, frontier

_BISECTIONS = 60


def ladder(price: Floats, rank: Floats, loss: Floats) -> Frontier:
    """Choices in order of price with strictly rising rank: the form that gives the highest rank at each price.

    ``value`` is minus the rank. Between equal price and rank the smaller loss stays.
    """
    order = np.argsort(loss, kind="stable")
    found = frontier(price[order], -rank[order])
    return Frontier(order[found.index], found.price, found.value)


def at_shares(ladders: Sequence[Frontier], dense: Floats, shares: Floats) -> list[int]:
    """Per site the highest rank whose price is at most its share of ``dense``; the cheapest where none is."""
    # A price is a whole number; a share that is exact but for rounding must not lose a rank.
    allowed = shares * dense * (1 + 1e-12)
    return [max(step.affordable(price), 0) for step, price in zip(ladders, allowed, strict=True)]


def common_share(picks: Callable[[float], list[int]], fits: Callable[[list[int]], bool]) -> list[int]:
    """The picks of the largest share in [0, 1] that fits. Those of share 0 must."""
    if fits(picks(1.0)):
        return picks(1.0)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(picks(middle)) else (low, middle)
    return picks(low)


def step_up(picks: list[int], ladders: Sequence[Frontier], fits: Callable[[list[int]], bool]) -> list[int]:
    """One rank step at a time, site after site in turn, as long as one fits."""
    picks = list(picks)
    moved = True
    while moved:
        moved = False
        for site, step in enumerate(ladders):
            if picks[site] + 1 < len(step):
                picks[site] += 1
                if fits(picks):
                    moved = True
                else:
                    picks[site] -= 1
    return picks


def typewise_weights(curves: Sequence[Curve], losses: Floats) -> Floats:
    """(sites,): R_i / R of the module's formula, from the truncation losses at the common share."""
    weights = np.ones(len(curves))
    groups: dict[str, list[int]] = {}
    for i, curve in enumerate(curves):
        groups.setdefault(curve.site.role or curve.site.name, []).append(i)
    for members in groups.values():
        L = losses[members]
        if L.max() <= 0:
            continue
        L = np.maximum(L, 1e-12 * L.max())
        inverse = 1.0 / (1.0 + np.log(L / L.min()))
        weights[members] = len(members) * inverse / inverse.sum()
    return weights
