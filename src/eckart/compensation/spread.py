"""One budget of parameters over the repairs of many maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eckart.errors import BudgetError


def spread_ranks(
    curves: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, largest: int
) -> dict[str, int]:
    """A rank for every map, 0 … ``largest``, with Σ rank · cost at most ``budget``.

    ``curves`` hold for each map the predicted loss that is left at rank 0, 1, …, in one unit for all, and ``costs``
    the parameters of one direction (out + in). Directions come best first, so gains within a map never rise, and
    taking them over all maps by gain per parameter is optimal, up to what is left over at the end.

    Raises BudgetError where not even one direction fits.
    """
    if budget < min(costs.values()):
        raise BudgetError(
            f"the budget of {budget} parameters is less than the {min(costs.values())} of one direction of the "
            "smallest map; give a larger share."
        )
    steps = [
        ((curve[rank] - curve[rank + 1]) / costs[name], name)
        for name, curve in curves.items()
        for rank in range(min(largest, len(curve) - 1))
    ]
    ranks, left = dict.fromkeys(curves, 0), budget
    for gain, name in sorted(steps, key=lambda step: -step[0]):
        if gain > 0 and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
