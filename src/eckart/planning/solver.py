"""Spend a budget on the ranks of all sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from eckart.errors import BudgetError, InputError, unknown
from eckart.planning.curve import Choice, Choices, Curve
from eckart.planning.frontier import Floats, Frontier, frontier, spend
from eckart.planning.groups import Group, combine
from eckart.planning.shares import at_shares, edge, in_turn, ladder, typewise_weights
from eckart.records import Budget, Size

Allocation = Literal["global", "uniform", "typewise"]
"""How a budget is spread: by loss over all sites, the same share everywhere, or by loss within like sites."""


def solve(
    curves: Sequence[Curve], budget: Budget, rest: Size, allocation: Allocation = "global", *, remainder: bool = True
) -> list[Choice]:
    """One choice per curve, in order, that meets the budget from below.

    ``rest`` is what the model costs besides the sites; budgets over the whole model count it.

    - ``global``: least Σ loss. Losses of different sites must be in one unit. What is left of the budget is
      less than any single site's next step.
    - ``uniform``: the largest common share of every site's dense cost, in the form that gives the
      highest rank at that share; the remainder goes to single rank steps, in turn, unless ``remainder`` is
      false: then like sites get like ranks.
    - ``typewise``: shares that differ between sites of equal role (:mod:`eckart.planning.shares`).

    A ceiling on the loss gives the fewest parameters under it (for the last two, the smallest share).
    500 sites with 4,096 ranks take about a second.

    Raises BudgetError, naming the nearest feasible budget, where none fits or where the budget exceeds
    the dense model; InputError for no curves or an unknown allocation.
    """
    if allocation not in get_args(Allocation):
        raise InputError(unknown("allocation", str(allocation), get_args(Allocation)))
    if not curves:
        raise InputError("there is nothing to plan: no sites were given.")
    losses = [curve.choices.loss for curve in curves]
    if budget.loss is None:
        costs = [cost_of(curve.choices, budget.unit) for curve in curves]
        price, value, limit = costs, losses, float(_limit(curves, costs, budget, rest))
    else:
        costs = [cost_of(curve.choices, "parameters") for curve in curves]
        price, value, limit = losses, costs, _ceiling(losses, budget.loss)
    if allocation == "global":
        fronts = [frontier(p, v) for p, v in zip(price, value, strict=True)]
        return _chosen(curves, fronts, spend(fronts, limit))
    ladders = [
        ladder(cost, curve.choices.rank.astype(np.float64), loss)
        for cost, curve, loss in zip(costs, curves, losses, strict=True)
    ]
    return _chosen(curves, ladders, _by_shares(curves, ladders, price, limit, budget, allocation, remainder))


def solve_groups(groups: Sequence[Group], budget: Budget, rest: Size) -> list[tuple[Curve, Choice]]:
    """The ``global`` allocation over groups: the alternatives that were taken, each curve with its choice.

    First over the frontiers of whole groups, which decides the alternatives; then over the curves of those
    alternatives, so that what was left between two corners of a group is spent. Raises as :func:`solve` does.
    """
    if not groups:
        raise InputError("there is nothing to plan: no sites were given.")
    flat = [[list(curves) for curves in group.alternatives] for group in groups]
    cheapest = [min(alternatives, key=lambda curves: _least(curves, budget)) for alternatives in flat]
    if budget.loss is None:
        unit, every = budget.unit, [curve for curves in cheapest for curve in curves]
        limit = float(_limit(every, [cost_of(curve.choices, unit) for curve in every], budget, rest))
    else:
        unit, every = "parameters", [curve for alternatives in flat for curve in alternatives[0]]
        best = [
            min(alternatives, key=lambda curves: sum(c.choices.loss.min() for c in curves)) for alternatives in flat
        ]
        limit = _ceiling([curve.choices.loss for curves in best for curve in curves], budget.loss)

    def front(curve: Curve) -> Frontier:
        cost, loss = cost_of(curve.choices, unit), curve.choices.loss
        return frontier(cost, loss) if budget.loss is None else frontier(loss, cost)

    fronts = [[[front(curve) for curve in curves] for curves in alternatives] for alternatives in flat]
    combined = [combine(group, own) for group, own in zip(groups, fronts, strict=True)]
    taken = spend([one.front for one in combined], limit)
    which = [one.which[at] for one, at in zip(combined, taken, strict=True)]
    picks = [at for one, position in zip(combined, taken, strict=True) for at in one.picks[position]]
    curves = [curve for alternatives, at in zip(flat, which, strict=True) for curve in alternatives[at]]
    own = [each for alternatives, at in zip(fronts, which, strict=True) for each in alternatives[at]]
    again = spend(own, limit)
    if _value(own, again) < _value(own, picks):
        picks = again
    return list(zip(curves, _chosen(curves, own, picks), strict=True))


def _least(curves: Sequence[Curve], budget: Budget) -> float:
    """What an alternative costs at least."""
    return float(sum(cost_of(curve.choices, budget.unit).min() for curve in curves))


def _value(fronts: Sequence[Frontier], picks: Sequence[int]) -> float:
    return math.fsum(float(front.value[at]) for front, at in zip(fronts, picks, strict=True))


def cost_of(choices: Choices, unit: str) -> Floats:
    """What the choices take of a budget in this unit."""
    column = {"bytes": choices.bytes, "macs": choices.macs}.get(unit, choices.parameters)
    return column.astype(np.float64)


def _whole(curve: Curve, unit: str) -> int:
    """What the site costs as it is."""
    size = curve.choices.whole
    return {"bytes": size.bytes, "macs": size.macs}.get(unit, size.parameters)


def _by_shares(
    curves: Sequence[Curve],
    ladders: Sequence[Frontier],
    price: Sequence[Floats],
    limit: float,
    budget: Budget,
    allocation: Allocation,
    remainder: bool,
) -> list[int]:
    """Positions in the ladders at the share, or family of shares, that just meets the limit."""
    dense = np.array([float(_whole(curve, budget.unit)) for curve in curves])
    prices = [p[step.index] for p, step in zip(price, ladders, strict=True)]
    rising = budget.loss is None
    most = max(float(step.price[-1]) / max(d, 1.0) for step, d in zip(ladders, dense, strict=True))

    def fits(picks: list[int]) -> bool:
        return math.fsum(p[at] for p, at in zip(prices, picks, strict=True)) <= limit

    def meet(weights: Floats) -> list[int]:
        def picks(share: float) -> list[int]:
            return at_shares(ladders, dense, 1.0 - (1.0 - share) * weights)

        # Shares at which every site is at its cheapest, and at its dearest.
        low, high = 1.0 - 1.0 / float(weights.min()), 1.0 + max(most - 1.0, 0.0) / float(weights.min())
        return edge(picks, fits, low, high) if rising else edge(picks, fits, high, low)

    picks = meet(np.ones(len(curves)))
    if allocation == "typewise":
        lost = [curve.choices.loss[step.index[at]] for curve, step, at in zip(curves, ladders, picks, strict=True)]
        picks = meet(typewise_weights(curves, np.array(lost)))
    return in_turn(picks, ladders, fits, 1 if rising else -1) if remainder else picks


def _chosen(curves: Sequence[Curve], fronts: Sequence[Frontier], picks: Sequence[int]) -> list[Choice]:
    return [c.choices[int(f.index[at])] for c, f, at in zip(curves, fronts, picks, strict=True)]


def _limit(curves: Sequence[Curve], costs: Sequence[Floats], budget: Budget, rest: Size) -> int:
    """What the sites may cost under the budget; raises BudgetError where it is too small or too large."""
    unit = budget.unit
    dense = sum(_whole(curve, unit) for curve in curves)
    least = sum(int(cost.min()) for cost in costs)
    beside = {"model_keep": rest.parameters, "parameters": rest.parameters, "bytes": rest.bytes}.get(unit, 0)
    asked = Fraction(getattr(budget, unit))
    if unit in ("keep", "model_keep"):
        # A float stands for every share that rounds to it: 0.6 of 10 is 6, a third of 9 is 3.
        asked *= (dense + beside) * (1 + Fraction(1, 2**50))
    limit = math.floor(asked) - beside
    if limit < least:
        nearest = _in_unit(least + beside, dense + beside, unit)
        raise BudgetError(
            f"the budget {budget} cannot be met: the least with these sites, forms and ranks is {nearest}. "
            "Ask for that or more, take in more sites, or lower min_rank."
        )
    if limit > dense:
        raise BudgetError(
            f"the budget {budget} is above the uncompressed model, which has {dense + beside:,} {unit} "
            f"in that count; there would be nothing to do. The largest budget is {dense + beside}."
        )
    return limit


def _in_unit(cost: int, dense: int, unit: str) -> str:
    """The cost as a value of the budget's field that surely meets it."""
    if unit not in ("keep", "model_keep"):
        return f"{unit} {cost}"
    digits = 10**6
    return f"{unit} {math.ceil(Fraction(cost, dense) * digits) / digits:g}"


def _ceiling(losses: Sequence[Floats], ceiling: float) -> float:
    least = math.fsum(float(loss.min()) for loss in losses)
    if least > ceiling:
        raise BudgetError(
            f"no choice of ranks keeps the predicted rise of the loss under {ceiling:g}; the least is "
            f"{least:.6g} (0 where dense is among the forms of every site)."
        )
    # Sums of losses round; what is promised is a ceiling.
    return max(ceiling * (1 - 1e-12), least)
