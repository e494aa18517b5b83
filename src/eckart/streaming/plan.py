"""From the curves of all sites to a plan, without decompositions in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import ArrayLike
from torch import nn

from eckart.arch import model_size, site_module, site_size
from eckart.compression import CompressMethod
from eckart.errors import InputError
from eckart.layers import supported_forms, unsupported
from eckart.planning import Allocation, Curve, Plan, choices_for, make_plan, solve
from eckart.records import Budget, FormKind, Site, Size

FORMS: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted")
"""What a streamed map may become."""


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

    def check(self, method: CompressMethod) -> None:
        """Raises InputError for a form that is not streamed, and for errors added up that are not in one unit."""
        if strange := sorted(set(self.forms) - set(FORMS)):
            raise InputError(f"--stream stores maps as {', '.join(FORMS)}; got {', '.join(strange)}.")
        if not method.loss_units and (self.allocation == "global" or self.budget.loss is not None):
            raise InputError(
                f"method {method.name!r} measures errors layer by layer, not in units of the loss, so no global budget "
                "and no ceiling on the loss can be met with it. Take allocation 'uniform' or 'typewise', or 'kfac'."
            )


def number_bytes(model: nn.Module, site: Site) -> int:
    """Bytes per number of the site's weight."""
    return site_module(model, site).get_parameter("weight").element_size()


def plan_from(
    model: nn.Module,
    sites: Sequence[Site],
    errors: Mapping[str, ArrayLike],
    wanted: Wanted,
    method: CompressMethod,
    options: Any,
    fingerprint: str,
) -> Plan:
    """Spend the budget. ``errors`` holds (full_rank + 1,) for each site. Raises BudgetError."""
    curves = [_curve(model, site, errors[site.name], wanted) for site in sites]
    return make_plan(
        curves,
        wanted.budget,
        _rest(model, sites),
        method=method.name,
        options=options,
        allocation=wanted.allocation,
        fingerprint=fingerprint,
        base=wanted.base,
    )


def foreseen_bytes(model: nn.Module, sites: Sequence[Site], wanted: Wanted) -> int:
    """About how many bytes the result has; all of the model's where the budget is a loss.

    Raises BudgetError where no ranks can meet the budget, so it is also the check before a calibration.
    """
    rest = _rest(model, sites)
    if wanted.budget.loss is not None:
        return model_size(model).bytes
    flat = {site.name: numpy.linspace(1.0, 0.0, site.full_rank + 1) for site in sites}
    curves = [_curve(model, site, flat[site.name], wanted) for site in sites]
    return rest.bytes + sum(choice.size.bytes for choice in solve(curves, wanted.budget, rest, "uniform"))


def _curve(model: nn.Module, site: Site, errors: ArrayLike, wanted: Wanted) -> Curve:
    possible = supported_forms(site) if unsupported(site_module(model, site)) is None else ("dense",)
    choices = choices_for(
        site,
        errors,
        forms=tuple(form for form in wanted.forms if form in possible) or ("dense",),
        rank_multiple=wanted.rank_multiple,
        min_rank=wanted.min_rank,
        bytes_per_number=number_bytes(model, site),
    )
    return Curve(site=site, choices=choices)


def _rest(model: nn.Module, sites: Sequence[Site]) -> Size:
    """What the model costs besides the weights of the sites."""
    whole = model_size(model)
    taken = [site_size(site, number_bytes(model, site)) for site in sites]
    return Size(
        parameters=whole.parameters - sum(size.parameters for size in taken),
        bytes=whole.bytes - sum(size.bytes for size in taken),
        macs=whole.macs - sum(size.macs for size in taken),
    )
