"""Ranks from shares: the same share of every site, or shares that differ within groups of like sites.

*Formula (type-wise).* Wang et al., “SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model
Compression”, 2025 (arXiv 2503.12340): within a group g of sites of equal role, at overall reduction R,
site i is reduced by

    R_i = |g| R (1 / log L_i) / Σ_j (1 / log L_j)

where L_i is its truncation loss at the reduction R.

*Departs from the paper in.* log L depends on the unit of L, and is zero or negative for small losses, where
the formula breaks down. Here L_i is divided by the least loss of its group and multiplied by e, so that
log L_i = 1 + log(L_i / min L) ≥ 1 in every unit. R_i above 1 is cut to 1, and R moves until the budget
is met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from eckart.planning.curve import Curve
from eckart.planning.frontier import Floats, Frontier, frontier

Fits = Callable[[list[int]], bool]

_BISECTIONS = 60


def ladder(price: Floats, rank: Floats, loss: Floats) -> Frontier:
    """Choices by price with strictly rising rank: the form that gives the highest rank at each price.

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


def edge(picks: Callable[[float], list[int]], fits: Fits, good: float, bad: float) -> list[int]:
    """The picks of the share nearest to ``bad`` that fit, where those of ``good`` do. Bisection."""
    if fits(picks(bad)):
        return picks(bad)
    for _ in range(_BISECTIONS):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(picks(middle)) else (good, middle)
    return picks(good)


def in_turn(picks: list[int], ladders: Sequence[Frontier], fits: Fits, step: Literal[1, -1]) -> list[int]:
    """One rank step up or down at a time, site after site, for as long as one fits."""
    picks = list(picks)
    moved = True
    while moved:
        moved = False
        for site, choices in enumerate(ladders):
            if 0 <= picks[site] + step < len(choices):
                picks[site] += step
                if fits(picks):
                    moved = True
                else:
                    picks[site] -= step
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
