"""Choices that are not dominated, and the smallest total under a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Frontier:
    """Some choices of a site in order: price strictly rises, value strictly falls."""

    index: Ints
    """Positions in the curve's choices."""
    price: Floats
    value: Floats

    def __len__(self) -> int:
        return len(self.index)

    def affordable(self, price: float) -> int:
        """The last position whose price is at most this; −1 where there is none."""
        return int(np.searchsorted(self.price, price, side="right")) - 1


def frontier(price: Floats, value: Floats) -> Frontier:
    """The choices to which no other is at least as good in both. Among equals the first stays."""
    order = np.lexsort((np.arange(len(price)), value, price))
    least = np.minimum.accumulate(value[order])
    better = np.concatenate([[True], value[order][1:] < least[:-1]])
    index = order[better]
    return Frontier(index, price[index], value[index])


def hull(front: Frontier) -> Ints:
    """Positions in a frontier on its lower convex hull: what a price per unit of value can choose."""
    kept = np.arange(len(front), dtype=np.int64)
    while len(kept) > 2:
        slope = np.diff(front.value[kept]) / np.diff(front.price[kept])
        # A point on or above the chord of its neighbours is not a corner of the hull of all points.
        corner = np.concatenate([[True], slope[1:] > slope[:-1], [True]])
        if corner.all():
            break
        kept = kept[corner]
    return kept


def spend(fronts: Sequence[Frontier], limit: float) -> list[int]:
    """Positions in the frontiers with small Σ value under Σ price ≤ limit, which the cheapest must meet.

    1. Walk down the hulls of all sites in order of value gained per price, which is what bisection on
       Lagrange's multiplier converges to, until a step does not fit. Those of other sites go on.
    2. Spend what is left: while some site has a choice of less value that fits, move the one that gains most.
    3. Exchange: cheapen one site by one choice where that pays for a larger gain elsewhere.

    After 2 nothing fits any more: what is left is less than one step of any site. The value is at most that
    of the best real-valued mixture plus one step of the hulls. Exchanges matter for few sites with coarse
    steps; they end when one gains less than 1e-5 of the value, or after 20,000 / sites of them.
    """
    position = _walk(fronts, limit)
    _fill(fronts, position, limit)
    for _ in range(20_000 // len(fronts)):
        if not _exchange(fronts, position, limit):
            break
        _fill(fronts, position, limit)
    return position


def total(fronts: Sequence[Frontier], position: Sequence[int]) -> float:
    """Σ price."""
    return float(sum(front.price[at] for front, at in zip(fronts, position, strict=True)))


def _walk(fronts: Sequence[Frontier], limit: float) -> list[int]:
    corners = [hull(front) for front in fronts]
    owner = np.concatenate([np.full(len(c) - 1, i) for i, c in enumerate(corners)])
    cost = np.concatenate([np.diff(f.price[c]) for f, c in zip(fronts, corners, strict=True)])
    gain = np.concatenate([-np.diff(f.value[c]) for f, c in zip(fronts, corners, strict=True)])
    order = np.argsort(-gain / cost, kind="stable")
    owner, cost = owner[order], cost[order]
    taken = np.zeros(len(fronts), np.int64)
    left = limit - total(fronts, [0] * len(fronts))
    while len(owner):
        fit = int(np.searchsorted(np.cumsum(cost), left, side="right"))
        taken += np.bincount(owner[:fit], minlength=len(fronts))
        left -= cost[:fit].sum()
        owner, cost = owner[fit:], cost[fit:]
        sites, following = np.unique(owner, return_index=True)
        going = np.zeros(len(fronts), bool)
        going[sites] = cost[following] <= left
        owner, cost = owner[going[owner]], cost[going[owner]]
    return [int(c[count]) for c, count in zip(corners, taken, strict=True)]


def _fill(fronts: Sequence[Frontier], position: list[int], limit: float) -> None:
    while True:
        left = limit - total(fronts, position)
        best, gain, to = -1, 0.0, -1
        for site, (front, at) in enumerate(zip(fronts, position, strict=True)):
            if at + 1 == len(front) or front.price[at + 1] > front.price[at] + left:
                continue
            reach = front.affordable(front.price[at] + left)
            if front.value[at] - front.value[reach] > gain:
                best, gain, to = site, front.value[at] - front.value[reach], reach
        if best < 0:
            return
        position[best] = to


def _exchange(fronts: Sequence[Frontier], position: list[int], limit: float) -> bool:
    """Carry out the one-choice-down, any-choice-up exchange that gains most; False where none gains."""
    left = limit - total(fronts, position)
    least = 1e-5 * sum(abs(float(f.value[at])) for f, at in zip(fronts, position, strict=True))
    movable = [i for i, at in enumerate(position) if at > 0]
    if not movable:
        return False
    sites = np.array(movable)
    here = np.array([position[i] for i in movable])
    freed = np.array([fronts[i].price[at] - fronts[i].price[at - 1] for i, at in zip(movable, here, strict=True)])
    lost = np.array([fronts[i].value[at - 1] - fronts[i].value[at] for i, at in zip(movable, here, strict=True)])
    best, move = least, (-1, -1, -1)
    for up, front in enumerate(fronts):
        at = position[up]
        if at + 1 == len(front):
            continue
        reach = np.searchsorted(front.price, front.price[at] + left + freed, side="right") - 1
        gain = front.value[at] - front.value[reach] - lost
        gain[sites == up] = 0.0
        down = int(gain.argmax())
        if gain[down] > best:
            best, move = float(gain[down]), (movable[down], up, int(reach[down]))
    down, up, to = move
    if up < 0:
        return False
    position[down] -= 1
    position[up] = to
    return True
