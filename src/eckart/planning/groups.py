"""Maps that exclude each other: each on its own, or several that become narrower together.

The query and key maps of an attention may each take any rank, or both become narrower by the same
coordinates. Those are two alternatives of one group; within an alternative, losses and costs add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eckart.planning.curve import Curve
from eckart.planning.frontier import Floats, Frontier, frontier, hull

Picks = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """One of ``alternatives`` happens, and in it one choice of each of its curves."""

    alternatives: tuple[tuple[Curve, ...], ...]

    @classmethod
    def single(cls, curve: Curve) -> Group:
        """A curve that has no alternative."""
        return cls(((curve,),))


@dataclass(frozen=True, eq=False)
class Combined:
    """The undominated combinations of a group, and what each of them is."""

    front: Frontier
    which: tuple[int, ...]
    """Per combination the alternative."""
    picks: tuple[Picks, ...]
    """Per combination the position in each curve's own frontier."""


def combine(group: Group, fronts: Sequence[Sequence[Frontier]]) -> Combined:
    """One frontier out of those of every alternative's curves.

    An alternative of one curve keeps all of its choices. Of several curves, the corners of the common hull are
    kept: what one price per unit of value would choose. The solver fills the gaps between them afterwards,
    curve by curve.
    """
    prices: list[Floats] = []
    values: list[Floats] = []
    which: list[int] = []
    picks: list[Picks] = []
    for at, curves in enumerate(fronts):
        if len(curves) == 1:
            front = curves[0]
            prices.append(front.price)
            values.append(front.value)
            found: list[Picks] = [(i,) for i in range(len(front))]
        else:
            found = _corners(curves)
            chosen = np.array(found)
            prices.append(sum((f.price[chosen[:, i]] for i, f in enumerate(curves)), np.zeros(len(found))))
            values.append(sum((f.value[chosen[:, i]] for i, f in enumerate(curves)), np.zeros(len(found))))
        which += [at] * len(found)
        picks += found
    front = frontier(np.concatenate(prices), np.concatenate(values))
    kept = front.index.tolist()
    return Combined(front, tuple(which[i] for i in kept), tuple(picks[i] for i in kept))


def _corners(curves: Sequence[Frontier]) -> list[Picks]:
    """Positions along the common lower hull of the sum of several frontiers, cheapest first."""
    hulls = [hull(front) for front in curves]
    steps = []
    for i, (front, corners) in enumerate(zip(curves, hulls, strict=True)):
        slopes = -np.diff(front.value[corners]) / np.diff(front.price[corners])
        steps += [(-slope, i, int(to)) for slope, to in zip(slopes.tolist(), corners[1:], strict=True)]
    now = [int(corners[0]) for corners in hulls]
    found: list[Picks] = [tuple(now)]
    for _, i, to in sorted(steps):
        now[i] = to
        found.append(tuple(now))
    return found
