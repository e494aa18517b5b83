"""Spend a budget on the ranks of all sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from eckart.errors import BudgetError, InputError, unknown
from eckart.planning.curve import Choice, Choices, Curve
from eckart.planning.frontier import Floats, Frontier, frontier, spend
from eckart.planning.shares import at_shares, common_share, ladder, step_up, typewise_weights
from eckart.records import Budget, Size

Allocation = Literal["global", "uniform", "typewise"]
"""How a budget is spread: by loss over all sites, the same share everywhere, or by loss within like sites."""


def solve(
    curves: Sequence[Curve], budget: Budget, rest: Size, allocation: Allocation = "global"
) -> list[Choice]:
    """One choice per curve, in order, that meets the budget from below.

    ``rest`` is what the model costs besides the sites; budgets over the whole model count it.

    - ``global``: least Σ loss. Losses of different sites must be in one unit. What is left of the budget is less
      than any single site's next step.
    - ``uniform``: the largest common share of every site's dense cost, in the form that gives the
      highest rank at that share; the remainder goes to single rank steps, in turn.
    - ``typewise``: shares that differ between sites of equal role (:mod:`eckart.planning.shares`).

    A ceiling on the loss gives the fewest parameters (of the whole family of shares, for the last two). 500 sites with 4,096
    ranks take about a second.

    Raises BudgetError, naming the nearest feasible budget, where none fits or where the budget exceeds
    the dense model; InputError for no curves or an unknown allocation.
    """
    if allocation not in get_args(Allocation):
        raise InputError(unknown("allocation", str(allocation), get_args(Allocation)))
    if not curves:
        raise InputError("there is nothing to plan: no sites were given.")
    if budget.loss is not None:
        return _under_loss(curves, budget.loss, allocation)
    costs = [_cost(curve.choices, budget.unit) for curve in curves]
    limit = _limit(curves, costs, budget, rest)
    if allocation == "global":
        fronts = [frontier(cost, c.choices.loss) for cost, c in zip(costs, curves, strict=True)]
        return _chosen(curves, fronts, spend(fronts, limit))
    ladders = _ladders(curves, costs)
    family = _family(curves, ladders, costs, allocation)

    def fits(picks: list[int]) -> bool:
        return sum(float(s.price[at]) for s, at in zip(ladders, picks, strict=True)) <= limit

    picks = common_share(family(lambda at: fits(at)), fits)
    return _chosen(curves, ladders, step_up(picks, ladders, fits))
