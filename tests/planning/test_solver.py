"""Budgets are met from below, closely, and near the optimum that integer programming finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from curves_of_random_models import REST, random_curves, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from eckart.errors import BudgetError, InputError, NotFiniteError
from eckart.planning import Choice, Choices, Curve, choices_for, solve
from eckart.records import Budget, Site, Size

ALLOCATIONS = ["global", "uniform", "typewise"]
SEEDS = st.integers(0, 10_000)


def total(chosen: Sequence[Choice]) -> Size:
    return sum((c.size for c in chosen), Size(parameters=0, bytes=0, macs=0))


def loss(chosen: Sequence[Choice]) -> float:
    return sum(c.loss for c in chosen)


def asked(unit: str, limit: int, size: Size) -> Budget:
    """The budget in this unit under which the sites may cost ``limit``."""
    if unit == "keep":
        return Budget(keep=limit / size.parameters)
    if unit == "model_keep":
        return Budget(model_keep=(limit + REST.parameters) / (size.parameters + REST.parameters))
    beside = {"parameters": REST.parameters, "bytes": REST.bytes, "macs": 0}[unit]
    return Budget(**{unit: limit + beside})


def optimum(value: list[np.ndarray], price: list[np.ndarray], limit: float) -> float:
    """Least Σ value under Σ price ≤ limit, one choice per site, by mixed-integer programming."""
    one = np.zeros((len(value), sum(map(len, value))))
    at = 0
    for i, v in enumerate(value):
        one[i, at : at + len(v)] = 1
        at += len(v)
    found = milp(
        np.concatenate(value),
        integrality=np.ones(at),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(np.concatenate(price)[None], -np.inf, limit),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert found.x is not None, found.message
    return float(found.fun)


def one_step(value: np.ndarray, price: np.ndarray) -> float:
    """The largest fall of value between neighbours on the lower hull of a site's choices."""
    order = np.lexsort((value, price))
    corners: list[int] = []
    for i in order:
        if corners and value[i] >= value[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2:]
            if (value[b] - value[a]) * (price[i] - price[a]) < (value[i] - value[a]) * (price[b] - price[a]):
                break
            corners.pop()
        corners.append(i)
    return float(max(-np.diff(value[corners]), default=0.0))


@given(seed=SEEDS, share=st.floats(0.0, 1.0), sites=st.integers(1, 12), multiple=st.sampled_from([1, 1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_global_is_near_the_optimum(seed: int, share: float, sites: int, multiple: int) -> None:
    curves = random_curves(seed, sites, rank_multiple=multiple)
    least = sum(int(c.choices.parameters.min()) for c in curves)
    limit = least + int(share * (whole(curves).parameters - least))
    value = [c.choices.loss for c in curves]
    price = [c.choices.parameters.astype(float) for c in curves]
    best = optimum(value, price, limit)
    step = max(one_step(v, p) for v, p in zip(value, price, strict=True))
    chosen = solve(curves, asked("keep", limit, whole(curves)), REST, "global")
    assert total(chosen).parameters <= limit
    assert loss(chosen) <= max(1.01 * best, best + step) + 1e-12


def test_global_is_mostly_within_one_percent_of_the_optimum() -> None:
    """36 sites, as a small encoder has: what one step may cost is small beside the sum."""
    worse = []
    for seed in range(12):
        curves = random_curves(seed, 36, largest=24, spread=1.0)
        limit = 0.6 * whole(curves).parameters
        best = optimum([c.choices.loss for c in curves], [c.choices.parameters.astype(float) for c in curves], limit)
        worse.append(loss(solve(curves, Budget(keep=0.6), REST)) / best - 1)
    assert max(worse) < 0.01


@given(seed=SEEDS, share=st.floats(0.001, 0.5), sites=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_smallest_model_under_a_loss_is_near_the_optimum(seed: int, share: float, sites: int) -> None:
    curves = random_curves(seed, sites)
    ceiling = share * sum(c.choices.loss.max() for c in curves)
    price = [c.choices.loss for c in curves]
    value = [c.choices.parameters.astype(float) for c in curves]
    best = optimum(value, price, ceiling)
    step = max(one_step(v, p) for v, p in zip(value, price, strict=True))
    chosen = solve(curves, Budget(loss=ceiling), REST)
    assert loss(chosen) <= ceiling
    assert total(chosen).parameters <= max(1.01 * best, best + step) + 1e-9


@pytest.mark.parametrize("unit", ["keep", "model_keep", "parameters", "bytes", "macs"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(seed=SEEDS, share=st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_every_budget_is_met_within_one_step(unit: str, allocation: str, seed: int, share: float) -> None:
    curves = random_curves(seed, 8)
    column = {"bytes": "bytes", "macs": "macs"}.get(unit, "parameters")
    least = sum(int(getattr(c.choices, column).min()) for c in curves)
    limit = least + int(share * (getattr(whole(curves), column) - least))
    chosen = solve(curves, asked(unit, limit, whole(curves)), REST, allocation)
    left = limit - getattr(total(chosen), column)
    assert left >= 0
    for curve, choice in zip(curves, chosen, strict=True):
        # Whatever would improve the site does not fit: by loss for the global budget, by rank for the others.
        table = curve.choices
        better = table.loss < choice.loss * (1 - 1e-9) if allocation == "global" else table.rank > choice.rank
        costs = getattr(table, column)[better] - getattr(choice.size, column)
        assert not len(costs) or costs.min() > left


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(seed=SEEDS, share=st.floats(0.0001, 1.0))
@settings(max_examples=25, deadline=None)
def test_loss_stays_under_its_ceiling(allocation: str, seed: int, share: float) -> None:
    curves = random_curves(seed, 6)
    ceiling = share * sum(c.choices.loss.max() for c in curves)
    chosen = solve(curves, Budget(loss=ceiling), REST, allocation)
    assert loss(chosen) <= ceiling
    for curve, choice in zip(curves, chosen, strict=True):
        smaller = curve.choices.parameters < choice.size.parameters
        less = smaller & (curve.choices.rank < choice.rank)
        worth = smaller if allocation == "global" else less
        if worth.any():
            assert curve.choices.loss[worth].min() - choice.loss > (ceiling - loss(chosen)) * (1 - 1e-9)


def test_the_whole_model_fits_a_budget_of_the_whole_model() -> None:
    curves = random_curves(0)
    size = whole(curves) + REST
    for budget in (
        Budget(keep=1.0),
        Budget(model_keep=1.0),
        Budget(parameters=size.parameters),
        Budget(bytes=size.bytes),
        Budget(macs=whole(curves).macs),
    ):
        for allocation in ALLOCATIONS:
            chosen = solve(curves, budget, REST, allocation)
            assert [c.form for c in chosen] == ["dense"] * len(curves)


def test_decimal_shares_are_exact() -> None:
    """0.1 is a little more than a tenth in binary, 0.7 · 10 a little less than 7."""
    site = Site(name="a", kind="linear", out_features=10, in_features=10)
    curve = Curve(site, choices_for(site, np.linspace(1, 0, 11), forms=("lowrank",)))
    for share, rank in ((0.2, 1), (0.4, 2), (0.6, 3), (0.8, 4), (0.59, 2), (0.6 - 1e-9, 2), (1 - 0.4, 3)):
        for allocation in ALLOCATIONS:
            assert [c.rank for c in solve([curve], Budget(keep=share), REST, allocation)] == [rank]


def test_uniform_gives_like_sites_like_ranks_whatever_they_lose() -> None:
    sites = [Site(name=f"{i}.a", kind="linear", out_features=64, in_features=64, role="a") for i in range(10)]
    errors = np.linspace(1, 0, 65) ** 2
    curves = [Curve(s, choices_for(s, errors * 10**i)) for i, s in enumerate(sites)]
    chosen = solve(curves, Budget(keep=0.6), REST, "uniform")
    ranks = [c.rank for c in chosen]
    assert max(ranks) - min(ranks) <= 1
    assert {c.form for c in chosen} == {"pivoted"}
    lowrank = [Curve(c.site, choices_for(c.site, errors, forms=("dense", "lowrank"))) for c in curves]
    ranks = [c.rank for c in solve(lowrank, Budget(keep=0.6), REST, "uniform")]
    assert set(ranks) <= {19, 20}
    assert sum(ranks) * 128 <= 0.6 * 10 * 64 * 64 < (sum(ranks) + 1) * 128


def test_an_exchange_finds_what_filling_up_does_not() -> None:
    """The best step for its price leaves room that nothing fills; the two others together fill it."""

    def site(name: str, price: int, gain: float) -> Curve:
        size = [Size(parameters=p, bytes=p, macs=p) for p in (1, 1 + price)]
        rows = [Choice("lowrank", 1, size[0], gain), Choice("lowrank", 2, size[1], 0.0)]
        kind = Site(name=name, kind="linear", out_features=20, in_features=20)
        return Curve(kind, Choices.of(rows, whole=Size(parameters=400, bytes=400, macs=400)))

    curves = [site("a", 6, 7.0), site("b", 10, 10.0)]
    chosen = solve(curves, Budget(macs=12), REST)
    assert [c.rank for c in chosen] == [1, 2]


def test_typewise_spares_those_that_lose_more_and_does_not_depend_on_the_unit_of_loss() -> None:
    sites = [Site(name=f"{i}.a", kind="linear", out_features=256, in_features=256, role="a") for i in range(3)]
    errors = np.linspace(1, 0, 257) ** 2
    seen = set()
    for unit in (1e-9, 1.0, 1e9):
        curves = [Curve(s, choices_for(s, errors * 10**i * unit)) for i, s in enumerate(sites)]
        sizes = [c.size.parameters for c in solve(curves, Budget(keep=0.6), REST, "typewise")]
        # R_i / R_j = (1 + log L_j/L_min) / (1 + log L_i/L_min), within the width of a rank step.
        removed = 1 - np.array(sizes) / 256**2
        expected = 1 / (1 + np.log([1, 10, 100]))
        expected *= removed.sum() / expected.sum()
        assert np.abs(removed - expected).max() < 2 / 256
        seen.add(tuple(sizes))
    assert len(seen) == 1


def test_typewise_leaves_shares_between_groups_alone() -> None:
    a = [Site(name=f"{i}.a", kind="linear", out_features=40, in_features=40, role="a") for i in range(2)]
    b = [Site(name=f"{i}.b", kind="linear", out_features=40, in_features=40, role="b") for i in range(2)]
    errors = np.linspace(1, 0, 41)
    curves = [Curve(s, choices_for(s, errors)) for s in a]
    curves += [Curve(s, choices_for(s, errors * 1000)) for s in b]
    ranks = [c.rank for c in solve(curves, Budget(keep=0.5), REST, "typewise")]
    assert max(ranks) - min(ranks) <= 1


def test_sites_that_must_stay_dense_are_paid_for_by_the_others() -> None:
    curves = random_curves(3, 6, largest=20)
    fixed = curves[0].site
    curves[0] = Curve(fixed, choices_for(fixed, np.zeros(fixed.full_rank + 1), forms=("dense",)))
    for allocation in ALLOCATIONS:
        chosen = solve(curves, Budget(keep=0.7), REST, allocation)
        assert chosen[0].form == "dense"
        assert total(chosen).parameters <= 0.7 * whole(curves).parameters


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_infeasible_budgets_name_one_that_is_feasible(allocation: str) -> None:
    curves = random_curves(1, 5, min_rank=2)
    for budget in (
        Budget(keep=0.01),
        Budget(model_keep=0.01),
        Budget(parameters=1),
        Budget(bytes=1),
        Budget(macs=1),
    ):
        with pytest.raises(BudgetError, match="cannot be met") as caught:
            solve(curves, budget, REST, allocation)
        words = str(caught.value).split("ranks is ")[1].split(". ")[0].split()
        assert words[0] == budget.unit
        nearest = float(words[1]) if "keep" in budget.unit else int(words[1])
        feasible = solve(curves, Budget(**{budget.unit: nearest}), REST, allocation)
        assert sum(c.choices.parameters.min() for c in curves) <= total(feasible).parameters


def test_budgets_above_the_model_say_what_the_model_has() -> None:
    curves = random_curves(1)
    size = whole(curves) + REST
    for budget, largest in (
        (Budget(parameters=size.parameters + 1), size.parameters),
        (Budget(bytes=size.bytes + 1), size.bytes),
        (Budget(macs=whole(curves).macs + 1), whole(curves).macs),
    ):
        with pytest.raises(BudgetError, match=f"largest budget is {largest}"):
            solve(curves, budget, REST)


def test_a_ceiling_below_every_loss_is_refused() -> None:
    curves = random_curves(1, forms=("lowrank",), rank_multiple=2)
    least = sum(c.choices.loss.min() for c in curves)
    with pytest.raises(BudgetError, match="the least is"):
        solve(curves, Budget(loss=least * 0.9), REST)
    assert loss(solve(curves, Budget(loss=least), REST)) == pytest.approx(least)


def test_bad_input_is_refused() -> None:
    curves = random_curves(1)
    with pytest.raises(InputError, match="no sites"):
        solve([], Budget(keep=0.5), REST)
    with pytest.raises(InputError, match="Did you mean 'uniform'"):
        solve(curves, Budget(keep=0.5), REST, "unifrom")
    site = curves[0].site
    with pytest.raises(NotFiniteError, match=site.name):
        Curve(site, choices_for(site, np.full(site.full_rank + 1, np.nan)))
    with pytest.raises(InputError, match="at least one choice"):
        Curve(site, Choices.of([], whole=whole(curves)))


def test_costs_of_every_form_and_kind() -> None:
    errors = np.arange(5)[::-1]
    linear = Site(name="l", kind="linear", out_features=4, in_features=6, slices=3)
    by = {(c.form, c.rank): c for c in choices_for(linear, errors, scale=2.0, bytes_per_number=2)}
    assert by["dense", 4].size == Size(parameters=72, bytes=144, macs=72)
    assert by["dense", 4].loss == 0
    assert by["lowrank", 2].size == Size(parameters=60, bytes=120, macs=60)
    assert by["pivoted", 2].size == Size(parameters=48, bytes=96 + 3 * 4 * 4, macs=48)
    assert by["pivoted", 2].loss == 4
    assert len(by) == 9
    shared = replace(linear, slices=1, tied=("other",))
    by = {(c.form, c.rank): c for c in choices_for(shared, errors)}
    assert by["lowrank", 1].size.macs == 2 * by["lowrank", 1].size.parameters
    table = Site(name="e", kind="embedding", out_features=4, in_features=100)
    by = {(c.form, c.rank): c for c in choices_for(table, errors)}
    assert by["dense", 4].size.macs == 0
    assert by["lowrank", 2].size.macs == 2 * 4
    assert by["pivoted", 2].size.macs == 2 * 2
    by = {(c.form, c.rank): c for c in choices_for(replace(table, tied=("head",)), errors)}
    assert by["lowrank", 2].size.macs == 2 * 4 + 2 * 104


def test_rank_limits() -> None:
    site = Site(name="l", kind="linear", out_features=20, in_features=30)
    errors = np.zeros(21)
    ranks = [c.rank for c in choices_for(site, errors, forms=("lowrank",), rank_multiple=8, min_rank=3)]
    assert ranks == [8, 16]
    assert [c.form for c in choices_for(site, errors, rank_multiple=32)] == ["dense"]
    with pytest.raises(InputError, match="is a multiple of 32"):
        choices_for(site, errors, rank_multiple=32, forms=("lowrank",))
    with pytest.raises(InputError, match="Did you mean 'pivoted'"):
        choices_for(site, errors, forms=("pivot",))
    with pytest.raises(InputError, match=r"expected errors at rank 0 … 20, \(21,\)"):
        choices_for(site, np.zeros(20))
    with pytest.raises(InputError, match="count from 1"):
        choices_for(site, errors, min_rank=0)
