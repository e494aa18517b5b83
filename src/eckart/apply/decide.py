"""From moments and a budget to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from torch import nn

from eckart.apply.prepare import PreparedSite, prepare_sites
from eckart.arch import model_size, site_module, site_size
from eckart.compression import CompressMethod
from eckart.errors import InputError
from eckart.layers import supported_forms, unsupported
from eckart.moments import Moments
from eckart.planning import Allocation, Curve, Plan, choices_for, make_plan, solve
from eckart.records import Budget, FormKind, Progress, Site, Size, silent


def element_size(model: nn.Module, site: Site) -> int:
    """Bytes per number of the site's weight."""
    return next(site_module(model, site).parameters()).element_size()


def forms_of(model: nn.Module, site: Site, forms: Sequence[FormKind]) -> tuple[FormKind, ...]:
    """Those of the wanted forms that the site can have."""
    if unsupported(site_module(model, site)) is not None:
        return ("dense",)
    return tuple(form for form in forms if form in supported_forms(site)) or ("dense",)


def rest_of(model: nn.Module, sites: Sequence[Site]) -> Size:
    """What the model costs besides the weights of the sites."""
    whole = model_size(model)
    taken = [site_size(site, element_size(model, site)) for site in sites]
    return Size(
        parameters=whole.parameters - sum(size.parameters for size in taken),
        bytes=whole.bytes - sum(size.bytes for size in taken),
        macs=whole.macs - sum(size.macs for size in taken),
    )


def default_allocation(method: CompressMethod) -> Allocation:
    """One budget over all sites where errors are in units of the loss, else the same share at every site."""
    return "global" if method.loss_units else "uniform"


def decide(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Moments | None,
    *,
    method: CompressMethod,
    options: Any,
    budget: Budget,
    allocation: Allocation | None = None,
    forms: Sequence[FormKind] = ("dense", "lowrank", "pivoted"),
    rank_multiple: int = 1,
    min_rank: int = 1,
    fingerprint: str = "",
    base: str = "",
    prepared: Mapping[str, PreparedSite] | None = None,
    progress: Progress = silent,
) -> tuple[Plan, Mapping[str, PreparedSite]]:
    """Decompose every site, unless ``prepared`` holds that already, then spend the budget on ranks and forms.

    Raises InputError where method, moments and allocation do not go together, BudgetError where the budget
    cannot be met.
    """
    allocation = allocation or default_allocation(method)
    if not method.loss_units and (allocation == "global" or budget.loss is not None):
        raise InputError(
            f"method {method.name!r} measures errors layer by layer, not in units of the loss, and one global "
            "budget (or a ceiling on the loss) over such errors does worse than equal shares. Take "
            "allocation 'uniform' or 'typewise', or method 'kfac'."
        )
    if prepared is None:
        prepared = prepare_sites(model, sites, moments, method, options, progress=progress)
    curves = [
        Curve(
            site=site,
            choices=choices_for(
                site,
                prepared[site.name].errors.numpy(),
                forms=forms_of(model, site, forms),
                rank_multiple=rank_multiple,
                min_rank=min_rank,
                bytes_per_number=element_size(model, site),
            ),
        )
        for site in sites
    ]
    plan = make_plan(
        curves,
        budget,
        rest_of(model, sites),
        method=method.name,
        options=options,
        allocation=allocation,
        fingerprint=fingerprint,
        base=base,
    )
    return plan, prepared


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
    picked = solve(curves, budget, rest_of(model, sites), allocation="uniform")
    return {site.name: (choice.form, choice.rank, choice.size) for site, choice in zip(sites, picked, strict=True)}
