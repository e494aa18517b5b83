"""From moments and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import nn

from eckart.apply.bits import GROUP, flat_bits, quantisable
from eckart.apply.choices import Table, element_size, forms_of
from eckart.apply.crew import Crew, crew_of
from eckart.apply.prepare import PreparedSite, prepare_sites
from eckart.apply.probe import refine
from eckart.apply.sparse import flat_sparse
from eckart.apply.units import prepare_units, units_of
from eckart.arch import model_size, site_size
from eckart.compression import CompressMethod, get_method
from eckart.errors import InputError
from eckart.modules import NATIVE_KINDS, ModuleMethod, PreparedUnit, module_units, obs
from eckart.moments import Moments
from eckart.planning import Allocation, Choices, Curve, Group, Plan, choices_for, solve, solve_groups
from eckart.planning.make import write_plan
from eckart.records import Budget, FormKind, Progress, Site, Size, Unit, silent


def rest_of(model: nn.Module, sites: Sequence[Site]) -> Size:
    """What the model costs besides the weights of the sites."""
    whole = model_size(model)
    taken = [site_size(site, element_size(model, site)) for site in sites]
    return Size(
        parameters=whole.parameters - sum(size.parameters for size in taken),
        bytes=whole.bytes - sum(size.bytes for size in taken),
        macs=whole.macs - sum(size.macs for size in taken),
    )


def default_allocation(method: CompressMethod | ModuleMethod) -> Allocation:
    """One budget over all sites where errors are in units of the loss, else the same share at every site."""
    return "global" if method.loss_units else "uniform"


def check_allocation(
    method: CompressMethod | ModuleMethod,
    allocation: Allocation | None,
    budget: Budget,
    bits: Sequence[int],
    forms: Sequence[FormKind] = (),
) -> Allocation:
    """The allocation, or the method's own. Raises InputError where the parts of a request do not go together."""
    allocation = allocation or default_allocation(method)
    if not method.loss_units and (allocation == "global" or budget.loss is not None):
        raise InputError(
            f"method {method.name!r} measures errors layer by layer, not in units of the loss, and one global "
            "budget (or a ceiling on the loss) over such errors does worse than equal shares. Take "
            "allocation 'uniform' or 'typewise', or method 'kfac'."
        )
    if bits and not (method.loss_units and allocation == "global"):
        raise InputError(
            f"bits are chosen under one global budget in units of the loss; got method {method.name!r} with "
            f"allocation {allocation!r}. Take method 'kfac' or 'modules' with allocation 'global'."
        )
    if "sparse" in forms and (
        isinstance(method, ModuleMethod) or not method.loss_units or allocation != "global" or budget.unit != "bytes"
    ):
        raise InputError(
            "zeros that are not stored save bytes, no multiply-adds and no time, and are chosen in units of the loss: "
            f"the form sparse needs a budget in bytes and method 'kfac' with allocation 'global'; got a budget in "
            f"{budget.unit}, method {method.name!r} and allocation {allocation!r}."
        )
    return allocation


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan, and what was computed on the way."""

    plan: Plan
    prepared: Mapping[str, PreparedSite]
    units: Mapping[str, PreparedUnit] = field(default_factory=dict)
    probed: float | None = None
    """Measured rise of the loss on the probe, with every map replaced as planned; None without probes."""


def decide(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Moments | None,
    *,
    method: CompressMethod | ModuleMethod,
    options: Any,
    budget: Budget,
    allocation: Allocation | None = None,
    forms: Sequence[FormKind] = ("dense", "lowrank", "pivoted", "narrow"),
    bits: Sequence[int] = (),
    rank_multiple: int = 1,
    min_rank: int = 1,
    fingerprint: str = "",
    base: str = "",
    prepared: Mapping[str, PreparedSite] | None = None,
    distance: Callable[[], float] | None = None,
    rounds: int = 0,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> Decision:
    """Decompose every site, unless ``prepared`` holds that already, then spend the budget on ranks and forms.

    With one global budget in units of the loss, ``narrow`` among the forms lets MLPs and attentions become narrower
    instead (:mod:`eckart.modules`), ``bits`` lets numbers be stored in so many bits, and ``rounds`` of probes measure
    with ``distance`` what was predicted (:mod:`eckart.apply.probe`). A method of narrower modules takes no ranks.

    Raises InputError where method, moments and allocation do not go together, BudgetError where the budget
    cannot be met.
    """
    allocation = check_allocation(method, allocation, budget, bits, forms)
    mixed = method.loss_units and allocation == "global"
    modules = isinstance(method, ModuleMethod)
    narrow = modules or (mixed and "narrow" in forms)
    unit_method = method if isinstance(method, ModuleMethod) else obs.METHOD
    unit_options = options if modules else obs.Options()
    units = units_of(model, sites, _parts(unit_options, allocation)) if narrow else []
    if modules and not units:
        raise InputError(no_units(model, sites, method.name))
    if isinstance(method, ModuleMethod):
        prepared = {}
        if bits and moments is not None:
            plain = get_method("kfac")
            prepared = prepare_sites(model, sites, moments, plain, plain.options(), crew=crew, progress=progress)
    elif prepared is None:
        prepared = prepare_sites(model, sites, moments, method, options, crew=crew, progress=progress)
    cut = (
        prepare_units(model, units, sites, moments, unit_method, unit_options, crew=crew_of(crew), progress=progress)
        if units
        else {}
    )
    table = Table(
        model=model,
        sites=sites,
        moments=moments,
        prepared=prepared,
        units={each.unit.name: each for each in units},
        cut=cut,
        forms=("dense",) if modules else tuple(forms),
        bits=tuple(bits),
        rank_multiple=rank_multiple,
        min_rank=min_rank,
    )
    groups = table.groups()
    rest = rest_of(model, sites)
    probed = None
    if mixed:
        chosen = solve_groups(groups, budget, rest)
        if distance is not None and rounds:
            chosen, probed = refine(table, groups, chosen, budget, rest, distance, rounds, progress)
    else:
        curves = [curve for group in groups for curve in group.alternatives[-1 if modules else 0]]
        chosen = list(zip(curves, solve(curves, budget, rest, allocation, remainder=not modules), strict=True))
    plan = write_plan(
        chosen,
        budget,
        rest,
        method="kfac" if modules else method.name,
        options={} if modules else options,
        allocation=allocation,
        unit_method=unit_method.name,
        unit_options=unit_options,
        group=GROUP,
        fingerprint=fingerprint,
        base=base,
    )
    return Decision(plan, prepared, cut, probed)


def _parts(options: Any, allocation: Allocation) -> Sequence[str] | None:
    """The kinds of units that become narrower, where the options leave it open."""
    if options.parts is not None:
        return list(options.parts)
    return NATIVE_KINDS if allocation == "uniform" and options.__class__ is obs.Options else None


def no_units(model: nn.Module, sites: Sequence[Site], method: str) -> str:
    """Why nothing of a model can become narrower."""
    reasons = dict(module_units(model, sites)[1])
    why = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in list(reasons.items())[:3])
    return (
        f"method {method!r} makes MLPs and attentions narrower, and none of this model's can be: "
        f"{why or 'their maps are not all selected'}. Take method 'kfac', which gives "
        "factors only, or select whole blocks."
    )


def check_budget(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    *,
    method: CompressMethod | ModuleMethod,
    options: Any,
    allocation: Allocation | None = None,
    forms: Sequence[FormKind] = ("dense", "lowrank", "pivoted", "narrow"),
    bits: Sequence[int] = (),
    rank_multiple: int = 1,
    min_rank: int = 1,
) -> None:
    """Raise BudgetError where no plan can meet the budget; needs no moments, so it comes before a calibration."""
    if isinstance(method, ModuleMethod):
        table = flat_table(model, sites, method, options, allocation, bits, rank_multiple, min_rank)
        solve_groups(table.groups(), budget, rest_of(model, sites))
    elif not (bits or "sparse" in forms) or budget.unit != "bytes":
        equal_shares(model, sites, budget, forms, rank_multiple, min_rank)
    else:
        curves = []
        for curve in flat_curves(model, sites, forms, rank_multiple, min_rank):
            site, choices = curve.site, curve.choices
            if isinstance(site, Site) and quantisable(site):
                zeros = flat_sparse(site, bits, element_size(model, site), choices.whole)
                choices = flat_bits(site, choices, bits, element_size(model, site)) if bits else choices
                choices = Choices.joined([choices, zeros]) if "sparse" in forms else choices
            curves.append(Curve(site=site, choices=choices))
        solve_groups([Group.single(curve) for curve in curves], budget, rest_of(model, sites))


def equal_widths(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    method: ModuleMethod,
    options: Any,
    allocation: Allocation | None,
    rank_multiple: int,
    min_rank: int,
) -> tuple[list[Site | Unit], dict[str, tuple[FormKind, int, Size]]]:
    """Units and sites with the form, width and size that they have at equal shares; needs no moments.

    Raises BudgetError where no widths can meet the budget, InputError where nothing can become narrower.
    """
    table = flat_table(model, sites, method, options, allocation, (), rank_multiple, min_rank)
    curves = [curve for group in table.groups() for curve in group.alternatives[-1]]
    picked = solve(curves, budget, rest_of(model, sites), "uniform", remainder=False)
    found = {curve.site.name: (one.form, one.rank, one.size) for curve, one in zip(curves, picked, strict=True)}
    return [curve.site for curve in curves], found


def flat_table(
    model: nn.Module,
    sites: Sequence[Site],
    method: ModuleMethod,
    options: Any,
    allocation: Allocation | None,
    bits: Sequence[int],
    rank_multiple: int,
    min_rank: int,
) -> Table:
    """The choices of a method of narrower modules before anything is known about losses."""
    units = units_of(model, sites, _parts(options, allocation or default_allocation(method)))
    if not units:
        raise InputError(no_units(model, sites, method.name))
    return Table(
        model=model,
        sites=sites,
        moments=None,
        prepared={},
        units={each.unit.name: each for each in units},
        cut={},
        forms=("dense",),
        bits=tuple(bits),
        rank_multiple=rank_multiple,
        min_rank=min_rank,
    )


def equal_shares(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    forms: Sequence[FormKind],
    rank_multiple: int,
    min_rank: int,
) -> dict[str, tuple[FormKind, int, Size]]:
    """Form, rank and size of every site at equal shares of the budget, which needs no moments.

    Raises BudgetError where no ranks can meet the budget, so it is also the check before a calibration.
    """
    curves = flat_curves(model, sites, forms, rank_multiple, min_rank)
    picked = solve(curves, budget, rest_of(model, sites), allocation="uniform")
    return {site.name: (choice.form, choice.rank, choice.size) for site, choice in zip(sites, picked, strict=True)}


def flat_curves(
    model: nn.Module, sites: Sequence[Site], forms: Sequence[FormKind], rank_multiple: int, min_rank: int
) -> list[Curve]:
    """Curves of all sites with the right sizes and losses that only say that more is better."""
    curves = []
    for site in sites:
        flat = numpy.linspace(1.0, 0.0, site.full_rank + 1)
        choices = choices_for(
            site,
            flat,
            scale=1.0,
            forms=forms_of(model, site, forms),
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            bytes_per_number=element_size(model, site),
        )
        curves.append(Curve(site=site, choices=choices))
    return curves
