"""From the curves of all sites to a plan, without decompositions in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
from numpy.typing import ArrayLike
from torch import nn

from eckart.apply.bits import GROUP, flat_bits, quantisable
from eckart.apply.choices import element_size, forms_of
from eckart.apply.decide import check_allocation, flat_table, rest_of
from eckart.arch import model_size
from eckart.compression import CompressMethod
from eckart.errors import InputError
from eckart.modules import ModuleMethod, UnitFacts
from eckart.planning import (
    Allocation,
    Choice,
    Choices,
    Curve,
    Group,
    Plan,
    choices_for,
    solve,
    solve_groups,
)
from eckart.planning.make import write_plan
from eckart.records import Budget, FormKind, Site, Size, Unit

FORMS: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted")
"""What a streamed map may become; methods of narrower modules make it narrow."""

Chosen = list[tuple[Curve, Choice]]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the compression is to keep."""

    budget: Budget
    allocation: Allocation
    forms: Sequence[FormKind]
    rank_multiple: int
    min_rank: int
    base: str
    """Name of the original."""
    most: int
    """Bytes of the largest weight file."""
    bits: tuple[int, ...] = ()
    """In which numbers may be stored."""
    group: int = GROUP

    def check(self, method: CompressMethod | ModuleMethod) -> None:
        """Raises InputError for a form that is not streamed, and for parts of a request that do not go together."""
        if strange := sorted(set(self.forms) - set(FORMS)):
            raise InputError(
                f"--stream stores maps as {', '.join(FORMS)}; got {', '.join(strange)}. Narrower blocks are streamed "
                "with --method modules, all of one width."
            )
        if isinstance(method, ModuleMethod):
            if self.allocation != "uniform" or self.budget.loss is not None:
                raise InputError(
                    f"--stream gives all blocks one width with method {method.name!r}, which is known before the first "
                    "block is read; widths that differ, and a ceiling on the loss, are chosen when all have been. Take "
                    "--allocation uniform, or leave out --stream."
                )
            if self.bits:
                raise InputError(
                    f"--stream stores the numbers of narrower blocks as they are; got bits {list(self.bits)} with "
                    f"method {method.name!r}. Take method 'kfac', or leave out --bits."
                )
        check_allocation(method, self.allocation, self.budget, self.bits)


def number_bytes(model: nn.Module, site: Site) -> int:
    """Bytes per number of the site's weight."""
    return element_size(model, site)


def site_choices(model: nn.Module, site: Site, errors: ArrayLike, wanted: Wanted) -> Choices:
    """What a site may become with its numbers as they are."""
    return choices_for(
        site,
        errors,
        forms=forms_of(model, site, wanted.forms),
        rank_multiple=wanted.rank_multiple,
        min_rank=wanted.min_rank,
        bytes_per_number=number_bytes(model, site),
    )


def plan_from(
    model: nn.Module,
    curves: Sequence[Curve],
    wanted: Wanted,
    method: CompressMethod,
    options: Any,
    fingerprint: str,
) -> tuple[Plan, dict[str, Choice]]:
    """Spend the budget: the plan, and what was chosen by site. Raises BudgetError."""
    rest = rest_of(model, [curve.site for curve in curves if isinstance(curve.site, Site)])
    if wanted.allocation == "global":
        chosen = solve_groups([Group.single(curve) for curve in curves], wanted.budget, rest)
    else:
        chosen = list(zip(curves, solve(curves, wanted.budget, rest, wanted.allocation), strict=True))
    plan = write_plan(
        chosen,
        wanted.budget,
        rest,
        method=method.name,
        options=options,
        allocation=wanted.allocation,
        group=wanted.group,
        fingerprint=fingerprint,
        base=wanted.base,
    )
    return plan, {curve.site.name: choice for curve, choice in chosen}


def equal_widths(
    model: nn.Module, sites: Sequence[Site], wanted: Wanted, method: ModuleMethod, options: Any
) -> tuple[list[UnitFacts], Chosen]:
    """The units that become narrower, and what every unit and site becomes at equal shares of the budget.

    Needs no moments, so it is also the check before a calibration. Raises BudgetError where no widths can meet the
    budget, InputError where nothing can become narrower.
    """
    table = flat_table(model, sites, method, options, wanted.allocation, (), wanted.rank_multiple, wanted.min_rank)
    curves = [curve for group in table.groups() for curve in group.alternatives[-1]]
    picked = solve(curves, wanted.budget, rest_of(model, sites), "uniform", remainder=False)
    return list(table.units.values()), list(zip(curves, picked, strict=True))


def narrow_plan(
    model: nn.Module,
    sites: Sequence[Site],
    chosen: Chosen,
    losses: Mapping[str, float],
    wanted: Wanted,
    method: ModuleMethod,
    options: Any,
    fingerprint: str,
) -> Plan:
    """The plan of :func:`equal_widths`, with the losses of the units at their widths."""
    known = [
        (curve, replace(choice, loss=losses.get(curve.site.name, 0.0)) if isinstance(curve.site, Unit) else choice)
        for curve, choice in chosen
    ]
    return write_plan(
        known,
        wanted.budget,
        rest_of(model, sites),
        method="kfac",
        options={},
        allocation=wanted.allocation,
        unit_method=method.name,
        unit_options=options,
        group=wanted.group,
        fingerprint=fingerprint,
        base=wanted.base,
    )


def foreseen_bytes(model: nn.Module, sites: Sequence[Site], wanted: Wanted) -> int:
    """About how many bytes the result has; all of the model's where the budget is a loss.

    Raises BudgetError where no ranks can meet the budget, so it is also the check before a calibration.
    """
    rest = rest_of(model, sites)
    if wanted.budget.loss is not None:
        return model_size(model).bytes
    curves = []
    for site in sites:
        choices = site_choices(model, site, numpy.linspace(1.0, 0.0, site.full_rank + 1), wanted)
        if wanted.bits and quantisable(site):
            choices = flat_bits(site, choices, wanted.bits, number_bytes(model, site))
        curves.append(Curve(site=site, choices=choices))
    if wanted.bits:
        picked = [choice for _, choice in solve_groups([Group.single(c) for c in curves], wanted.budget, rest)]
    else:
        picked = solve(curves, wanted.budget, rest, "uniform")
    return rest.bytes + sum(choice.size.bytes for choice in picked)


def nothing() -> Size:
    """A size of zero, to add up from."""
    return Size(parameters=0, bytes=0, macs=0)
