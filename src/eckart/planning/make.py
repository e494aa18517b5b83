"""Curves and a budget in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from eckart.errors import InputError
from eckart.planning.curve import Choice, Curve
from eckart.planning.plan import Plan, Step, Totals
from eckart.planning.solver import Allocation, solve
from eckart.records import Budget, Site, Size, Unit


def make_plan(
    curves: Sequence[Curve],
    budget: Budget,
    rest: Size,
    *,
    method: str,
    options: Any = None,
    allocation: Allocation = "global",
    fingerprint: str = "",
    base: str = "",
) -> Plan:
    """Solve for the ranks and write them down, one step per curve in order, dense ones too.

    ``rest`` is what the model costs besides the sites, ``options`` those of the method (its dataclass, or a
    mapping by name). Raises as :func:`eckart.planning.solve` does.
    """
    chosen = list(zip(curves, solve(curves, budget, rest, allocation), strict=True))
    return write_plan(
        chosen,
        budget,
        rest,
        method=method,
        options=options,
        allocation=allocation,
        fingerprint=fingerprint,
        base=base,
    )


def write_plan(
    chosen: Sequence[tuple[Curve, Choice]],
    budget: Budget,
    rest: Size,
    *,
    method: str,
    options: Any = None,
    allocation: Allocation = "global",
    unit_method: str = "",
    unit_options: Any = None,
    group: int = 0,
    fingerprint: str = "",
    base: str = "",
) -> Plan:
    """The plan of curves whose choices are made; ``unit_method`` is that of units of maps, ``group`` of bits.

    A unit at its full width becomes dense steps of its sites.
    """
    own, other = _by_name(options), _by_name(unit_options)
    steps: dict[str, Step] = {}
    for curve, choice in chosen:
        storage = {"bits": choice.bits, "group": group if choice.bits else 0, "repair": choice.repair}
        if isinstance(curve.site, Site):
            steps[curve.site.name] = Step(
                site=curve.site.name, form=choice.form, rank=choice.rank, method=method, options=own, **storage
            )
        elif choice.form == "narrow" or choice.bits:
            steps[curve.site.name] = Step(
                site=curve.site.name, form="narrow", rank=choice.rank, method=unit_method, options=other, **storage
            )
    narrow = {name for curve, _ in chosen if curve.site.name in steps for name in sites_of(curve.site)}
    for curve, _ in chosen:
        for name in sites_of(curve.site):
            if name not in narrow:
                steps[name] = Step(site=name, form="dense", method=method, options=own)
    nothing = Size(parameters=0, bytes=0, macs=0)
    before = sum((curve.choices.whole for curve, _ in chosen), nothing)
    after = sum((choice.size for _, choice in chosen), nothing)
    return Plan(
        steps=tuple(steps.values()),
        method=method,
        options=own,
        allocation=allocation,
        budget=budget,
        fingerprint=fingerprint,
        base=base,
        totals=Totals(
            sites_before=before,
            sites_after=after,
            model_before=before + rest,
            model_after=after + rest,
            objective=sum(choice.loss for _, choice in chosen),
        ),
    )


def sites_of(place: Site | Unit) -> tuple[str, ...]:
    """The names of the sites of a curve."""
    return (place.name,) if isinstance(place, Site) else place.sites


def _by_name(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if isinstance(options, Mapping):
        return dict(options)
    if is_dataclass(options) and not isinstance(options, type):
        return asdict(options)
    raise InputError(f"options: expected the method's options or a mapping by name; got {options!r}.")
