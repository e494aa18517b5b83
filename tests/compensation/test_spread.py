"""One budget over many repairs: optimal, and never exceeded."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from eckart.compensation import spread_ranks
from eckart.errors import BudgetError


def curves(seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in "abc":
        tails = torch.rand(4, generator=generator).sort(descending=True).values.flip(0).cumsum(0).flip(0)
        found[name] = [*tails.tolist(), 0.0]
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 3, 7, 12])
def test_equal_costs_give_the_best_of_all_choices(seed: int, budget: int) -> None:
    known = curves(seed)

    def left(ranks: tuple[int, ...]) -> float:
        return sum(known[name][rank] for name, rank in zip("abc", ranks, strict=True))

    found = spread_ranks(known, dict.fromkeys("abc", 10), 10 * budget + 9, 4)
    assert sum(found.values()) == budget
    best = min(left(ranks) for ranks in product(range(5), repeat=3) if sum(ranks) <= budget)
    assert left(tuple(found.values())) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_unequal_costs_are_never_exceeded_and_no_worse_than_one_step(seed: int) -> None:
    known, costs, budget = curves(seed), {"a": 3, "b": 5, "c": 11}, 40
    found = spread_ranks(known, costs, budget, 4)
    assert sum(costs[name] * rank for name, rank in found.items()) <= budget
    loss = sum(known[name][rank] for name, rank in found.items())
    smaller = min(
        sum(known[name][rank] for name, rank in zip(known, ranks, strict=True))
        for ranks in product(range(5), repeat=3)
        if sum(costs[name] * rank for name, rank in zip(known, ranks, strict=True)) <= budget - max(costs.values())
    )
    assert loss <= smaller


def test_the_largest_rank_is_kept_to() -> None:
    assert spread_ranks(curves(0), dict.fromkeys("abc", 1), 100, 2) == {"a": 2, "b": 2, "c": 2}


def test_what_lost_nothing_gets_nothing() -> None:
    assert spread_ranks({"a": [0.0, 0.0], "b": [1.0, 0.0]}, {"a": 1, "b": 1}, 10, 4) == {"a": 0, "b": 1}


def test_a_budget_below_one_direction_is_refused() -> None:
    with pytest.raises(BudgetError, match="less than the 3 of one direction"):
        spread_ranks(curves(0), {"a": 3, "b": 5, "c": 11}, 2, 4)
