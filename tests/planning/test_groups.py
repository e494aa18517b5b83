"""Groups of alternatives: near the integer optimum, under budgets; and plans that hold units, bits and repairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from curves_of_random_models import REST, random_curves, whole
from test_solver import one_step, optimum
from torch import nn

from eckart.errors import BudgetError, InputError
from eckart.layers import QuantisedLinear
from eckart.linalg import round_groups
from eckart.planning import (
    Choice,
    Choices,
    Curve,
    Group,
    Plan,
    Step,
    check,
    quantised_bytes,
    solve,
    solve_groups,
    unit_choices,
    with_bits,
)
from eckart.records import Budget, Site, Size, Unit

NOTHING = Size(parameters=0, bytes=0, macs=0)


def unit_over(sites: Sequence[Site], *, step: int = 1, indices: int = 0) -> Unit:
    """A unit that could hold these maps: its width times its parameters per width is what they cost."""
    numbers = sum(site.out_features * site.in_features for site in sites)
    full = next(k for k in range(12, 0, -1) if numbers % k == 0 and k % step == 0)
    return Unit(
        name=f"{sites[0].name}#neurons",
        kind="neurons",
        sites=tuple(site.name for site in sites),
        full_rank=full,
        step=step,
        width_parameters=numbers // full,
        width_indices=indices,
    )


def in_bits(curve: Curve, bits: int, rng: np.random.Generator) -> Curve:
    """The same choices, and all of them in few bits: a quarter or half of the bytes, and some noise."""
    noise = 1e-3 * curve.choices.loss.max() * rng.uniform(0.5, 1.5) * np.ones(len(curve.choices)) * 16.0 ** (4 - bits)
    packed = with_bits(curve.choices, bits, noise, curve.choices.bytes * bits // 32 + 8)
    return Curve(curve.site, Choices.joined([curve.choices, packed]))


def random_groups(seed: int, pairs: int = 3, singles: int = 2, *, bits: bool = False, **more: Any) -> list[Group]:
    """Pairs of maps, each with any rank or narrower together, and maps on their own."""
    rng = np.random.default_rng(seed)
    curves = random_curves(seed, 2 * pairs + singles, **more)
    if bits:
        curves = [in_bits(curve, int(rng.choice([4, 8])), rng) for curve in curves]
    found = []
    for i in range(pairs):
        both = curves[2 * i : 2 * i + 2]
        unit = unit_over([curve.site for curve in both if isinstance(curve.site, Site)])
        squares = np.sort(rng.gamma(0.5, 1.0, unit.full_rank))[::-1] * 10 ** rng.uniform(-3, 0)
        errors = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        narrow = Curve(unit, unit_choices(unit, errors))
        found.append(Group((tuple(both), (in_bits(narrow, 8, rng) if bits else narrow,))))
    return found + [Group.single(curve) for curve in curves[2 * pairs :]]


def pool(group: Group, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(loss, cost) of everything that a group may become, alternatives and combinations alike, undominated."""
    rows = []
    for curves in group.alternatives:
        tables = [list(zip(c.choices.loss.tolist(), getattr(c.choices, column).tolist(), strict=True)) for c in curves]
        rows += [(sum(r[0] for r in rows_), sum(r[1] for r in rows_)) for rows_ in product(*tables)]
    kept: list[tuple[float, float]] = []
    for loss, cost in sorted(rows, key=lambda row: (row[1], row[0])):
        if not kept or loss < kept[-1][0]:
            kept.append((loss, cost))
    table = np.array(kept)
    return table[:, 0], table[:, 1]


def size_of(groups: Sequence[Group]) -> Size:
    return whole([curve for group in groups for curve in group.alternatives[0]])


def total(chosen: Sequence[tuple[Curve, Choice]], column: str = "parameters") -> int:
    return sum(getattr(choice.size, column) for _, choice in chosen)


def loss(chosen: Sequence[tuple[Curve, Choice]]) -> float:
    return sum(choice.loss for _, choice in chosen)


def is_complete(groups: Sequence[Group], chosen: Sequence[tuple[Curve, Choice]]) -> bool:
    """Whether one whole alternative of every group is there, in order, and each choice is one of its curve."""
    at = 0
    for group in groups:
        fitting = [
            curves
            for curves in group.alternatives
            if [id(c) for c in curves] == [id(c) for c, _ in chosen[at : at + len(curves)]]
        ]
        if len(fitting) != 1:
            return False
        at += len(fitting[0])
    return at == len(chosen) and all(choice in list(curve.choices) for curve, choice in chosen)


@pytest.mark.parametrize("bits", [False, True], ids=["ranks and widths", "and bits"])
def test_few_groups_are_within_a_step_of_the_integer_optimum(bits: bool) -> None:
    column = "bytes" if bits else "parameters"
    for seed in range(50):
        groups = random_groups(seed, pairs=1 + seed % 3, singles=seed % 4, bits=bits, largest=8)
        tables = [pool(group, column) for group in groups]
        least = sum(int(cost.min()) for _, cost in tables)
        share = np.random.default_rng(seed).uniform()
        limit = least + int(share * (getattr(size_of(groups), column) - least))
        best = optimum([v for v, _ in tables], [p for _, p in tables], limit)
        step = max(one_step(v, p) for v, p in tables)
        chosen = solve_groups(groups, Budget(**{column: limit + getattr(REST, column)}), REST)
        assert is_complete(groups, chosen)
        assert total(chosen, column) <= limit
        assert best - 1e-5 <= loss(chosen) <= max(1.01 * best, best + step) + 1e-12


@pytest.mark.parametrize("bits", [False, True], ids=["ranks and widths", "and bits"])
def test_many_groups_are_within_one_percent_of_the_integer_optimum(bits: bool) -> None:
    """As many as a small encoder has: what one step may cost is small beside the sum."""
    column, worse, narrow = ("bytes" if bits else "parameters"), [], 0
    for seed in range(6):
        groups = random_groups(seed, pairs=12, singles=12, bits=bits, largest=20, spread=1.0)
        tables = [pool(group, column) for group in groups]
        limit = int((0.2 if bits else 0.6) * getattr(size_of(groups), column))
        best = optimum([v for v, _ in tables], [p for _, p in tables], limit)
        chosen = solve_groups(groups, Budget(**{column: limit + getattr(REST, column)}), REST)
        assert total(chosen, column) <= limit
        worse.append(loss(chosen) / best - 1)
        narrow += sum(choice.form == "narrow" for _, choice in chosen)
    assert narrow > 0
    assert max(worse) < 0.01, worse


def test_curves_without_alternatives_are_solved_as_ever() -> None:
    for seed in range(20):
        curves = random_curves(seed, 8)
        for budget in (Budget(keep=0.6), Budget(loss=0.1 * sum(c.choices.loss.max() for c in curves))):
            chosen = solve_groups([Group.single(curve) for curve in curves], budget, REST)
            assert [curve for curve, _ in chosen] == curves
            assert [choice for _, choice in chosen] == solve(curves, budget, REST)


@pytest.mark.parametrize("unit", ["keep", "model_keep", "parameters", "bytes", "macs"])
def test_every_budget_is_met_from_below_and_nothing_more_fits(unit: str) -> None:
    column = {"bytes": "bytes", "macs": "macs"}.get(unit, "parameters")
    for seed in range(10):
        groups = random_groups(seed)
        full, beside = getattr(size_of(groups), column), {"macs": 0, "keep": 0}.get(unit, getattr(REST, column))
        least = sum(int(pool(group, column)[1].min()) for group in groups)
        limit = (least + full) // 2
        beside = REST.parameters if unit == "model_keep" else beside
        amount = (limit + beside) / (full + beside) if "keep" in unit else limit + beside
        chosen = solve_groups(groups, Budget(**{unit: amount}), REST)
        left = limit - total(chosen, column)
        assert left >= 0
        for curve, choice in chosen:
            better = curve.choices.loss < choice.loss * (1 - 1e-9)
            more = getattr(curve.choices, column)[better] - getattr(choice.size, column)
            assert not len(more) or more.min() > left


def test_the_loss_stays_under_its_ceiling() -> None:
    for seed in range(20):
        groups = random_groups(seed)
        tables = [pool(group, "parameters") for group in groups]
        ceiling = 0.05 * sum(float(v.max()) for v, _ in tables)
        chosen = solve_groups(groups, Budget(loss=ceiling), REST)
        best = optimum([p for _, p in tables], [v for v, _ in tables], ceiling)
        step = max(one_step(p, v) for v, p in tables)
        assert loss(chosen) <= ceiling
        assert total(chosen) <= max(1.01 * best, best + step) + 1e-9


def test_a_budget_that_only_one_alternative_can_meet() -> None:
    both = [Site(name=f"a.{i}", kind="linear", out_features=8, in_features=8) for i in range(2)]
    size = Size(parameters=64, bytes=256, macs=64)
    dense = [Curve(s, Choices.of([Choice("dense", 8, size, 0.0)], whole=size)) for s in both]
    unit = unit_over(both, indices=2)
    narrow = Curve(unit, unit_choices(unit, np.linspace(1, 0, unit.full_rank + 1)))
    groups = [Group((tuple(dense), (narrow,)))]
    ((curve, choice),) = solve_groups(groups, Budget(keep=0.5), REST)
    assert curve is narrow
    assert (choice.form, choice.rank) == ("narrow", unit.full_rank // 2)
    assert choice.size.bytes == 4 * choice.size.parameters + 2 * 4 * choice.rank
    assert [c.form for _, c in solve_groups(groups, Budget(keep=1.0), REST)] == ["dense"] * 2
    least = int(narrow.choices.parameters.min())
    assert total(solve_groups(groups, Budget(keep=least / 128), REST)) == least
    with pytest.raises(BudgetError, match=r"cannot be met: the least .* is keep"):
        solve_groups(groups, Budget(keep=0.01), REST)
    with pytest.raises(BudgetError, match="above the uncompressed model"):
        solve_groups(groups, Budget(parameters=REST.parameters + 129), REST)
    with pytest.raises(InputError, match="nothing to plan"):
        solve_groups([], Budget(keep=0.5), REST)


def test_widths_are_multiples_of_the_units_step_and_of_what_was_asked() -> None:
    unit = Unit(
        name="a#queries", kind="queries", sites=("a", "b"), full_rank=24, step=2, width_parameters=10, width_indices=3
    )
    errors = np.linspace(1, 0, 25)
    assert unit_choices(unit, errors).rank.tolist() == [*range(2, 24, 2), 24]
    assert unit_choices(unit, errors, multiple=3).rank.tolist() == [6, 12, 18, 24]
    assert unit_choices(unit, errors, multiple=4, min_width=9).rank.tolist() == [12, 16, 20, 24]
    table = unit_choices(unit, errors, bytes_per_number=2)
    assert table.parameters.tolist() == [10 * k for k in table.rank]
    assert table.bytes.tolist() == [20 * k + 12 * k * (k < 24) for k in table.rank]
    assert table.loss[-1] == 0
    assert (table[-1].form, table[0].form) == ("dense", "narrow")
    assert table.whole == table[-1].size
    with pytest.raises(InputError, match="width 0 … 24"):
        unit_choices(unit, errors[1:])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("m", "n", "group"), [(7, 10, 4), (5, 128, 128), (3, 130, 128), (4, 3, 128), (6, 33, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_bytes_are_those_of_the_layer(bits: int, m: int, n: int, group: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    new = QuantisedLinear.from_linear(layer, round_groups(layer.weight.detach(), bits=bits, group=group))
    real = sum(buffer.nbytes for buffer in new.buffers()) + sum(p.nbytes for p in new.parameters())
    assert quantised_bytes(m, n, bits, group, dtype.itemsize) == real
    assert quantised_bytes([m, m], n, bits, group, dtype.itemsize).tolist() == [real] * 2


def test_bits_keep_the_parameters_and_add_noise_and_a_repair_adds_its_own() -> None:
    (curve,) = random_curves(3, 1)
    table = curve.choices
    noise = np.linspace(0.1, 0.2, len(table))
    packed = with_bits(table, 4, noise, table.bytes // 8)
    assert (packed.bits == 4).all()
    assert (packed.repair == 0).all()
    assert np.array_equal(packed.parameters, table.parameters)
    np.testing.assert_allclose(packed.loss, table.loss + noise)
    repaired = with_bits(table[:1], 4, noise[:1], table.bytes[:1], repair=2, numbers=30)[0]
    assert (repaired.bits, repaired.repair, repaired.form) == (4, 2, table[0].form)
    assert repaired.size.parameters == table[0].size.parameters + 30
    assert Choices.of(list(packed), whole=table.whole)[2] == packed[2]
    np.testing.assert_allclose(packed.scaled(3.0).loss, 3 * packed.loss)


# ---- plans

SITES = (
    Site(name="up", kind="linear", out_features=12, in_features=6),
    Site(name="down", kind="linear", out_features=6, in_features=12),
    Site(name="other", kind="linear", out_features=6, in_features=6),
)
UNIT = Unit(
    name="mlp#neurons", kind="neurons", sites=("up", "down"), full_rank=12, width_parameters=12, width_indices=0
)
PAIRS = replace(UNIT, name="attn#queries", kind="queries", sites=("other",), full_rank=6, step=2)
FUSED = replace(PAIRS, name="attn#values", kind="values")
NARROW = Step(site=UNIT.name, form="narrow", rank=5, method="modules")


def plan_of(*steps: Step) -> Plan:
    return Plan(steps=steps, method="kfac")


def checked(*steps: Step) -> None:
    check(plan_of(*steps), SITES, (UNIT, PAIRS, FUSED))


def test_json_both_ways_with_units_bits_and_repairs() -> None:
    plan = plan_of(
        replace(NARROW, bits=4, group=128, options={"gradient_shrinkage": 0.3}),
        Step(site="other", form="dense", rank=6, method="kfac", bits=4, group=64, repair=8),
        Step(site="third", form="pivoted", rank=3, method="kfac", bits=8, group=128),
        Step(site="plain", form="lowrank", rank=3, method="kfac"),
    )
    assert Plan.from_json(plan.to_json()) == plan
    rows = plan.to_json()["steps"]
    assert [set(row) & {"bits", "group", "repair"} for row in rows] == [
        {"bits", "group"},
        {"bits", "group", "repair"},
        {"bits", "group"},
        set(),
    ]
    rows[0]["bits"] = "four"
    with pytest.raises(InputError, match="'bits' expects a whole number"):
        Plan.from_json({**plan.to_json(), "steps": rows})


def test_plans_that_fit() -> None:
    checked(NARROW, Step(site="other", form="lowrank", rank=2, method="kfac", bits=8, group=128))
    checked(NARROW, Step(site="up", form="dense", method="kfac"))
    checked(Step(site=PAIRS.name, form="narrow", rank=4, method="modegpt", bits=2, group=4))
    checked(Step(site="other", form="dense", rank=6, method="kfac", bits=4, group=16, repair=2))
    checked(replace(NARROW, site=PAIRS.name, rank=4), replace(NARROW, site=FUSED.name, rank=2))


OTHER = Step(site="other", form="dense", rank=6, method="kfac")
THIN = replace(OTHER, form="lowrank", rank=2)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([NARROW, Step(site="up", form="lowrank", rank=2, method="kfac")], "up would change twice"),
        ([Step(site="down", form="dense", method="kfac", bits=8, group=9), NARROW], "down would change twice"),
        ([NARROW, replace(NARROW, rank=4)], "more than one step"),
        (
            [replace(NARROW, site=PAIRS.name, rank=4, bits=8, group=4), replace(NARROW, site=FUSED.name, rank=2)],
            "other: its rows belong to attn#queries and attn#values, which need equal bits",
        ),
        ([replace(NARROW, rank=0)], "width 0 is not from 1 to 12"),
        ([replace(NARROW, rank=13)], "width 13 is not from 1 to 12"),
        ([replace(NARROW, site=PAIRS.name, rank=3)], "width 3 is not from 1 to 6 and a multiple of 2"),
        ([replace(NARROW, site="mlp#neuron")], "Did you mean .*mlp#neurons"),
        ([replace(NARROW, method="kfac")], "unknown method 'kfac'"),
        ([replace(NARROW, options={"ridge": 1})], "ridge"),
        ([replace(NARROW, bits=3, group=128)], "bits is one of 2, 4, 8"),
        ([replace(NARROW, bits=4)], "group counts the columns"),
        ([replace(NARROW, bits=4, group=128, repair=2)], "repair is the rank of a correction beside a dense weight"),
        ([replace(THIN, bits=4, group=8, repair=2)], "repair is the rank of a correction beside a dense weight"),
        ([replace(OTHER, bits=4, group=8, repair=-1)], "repair is the rank"),
        ([replace(OTHER, group=8)], "group and repair need bits"),
        ([replace(THIN, repair=8)], "group and repair need bits"),
    ],
)
def test_plans_that_do_not_fit(steps: list[Step], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(*steps)


def test_a_model_without_units_says_so() -> None:
    with pytest.raises(InputError, match="no units of maps"):
        check(plan_of(NARROW), SITES)
