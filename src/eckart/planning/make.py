"""Curves and a budget in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from eckart.errors import InputError
from eckart.planning.curve import Curve
from eckart.planning.plan import Plan, Step, Totals
from eckart.planning.solver import Allocation, solve
from eckart.records import Budget, Size


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
    chosen = solve(curves, budget, rest, allocation)
    given = _by_name(options)
    nothing = Size(parameters=0, bytes=0, macs=0)
    before = sum((curve.choices.whole for curve in curves), nothing)
    after = sum((choice.size for choice in chosen), nothing)
    return Plan(
        steps=tuple(
            Step(site=curve.site.name, form=choice.form, rank=choice.rank, method=method, options=given)
            for curve, choice in zip(curves, chosen, strict=True)
        ),
        method=method,
        options=given,
        allocation=allocation,
        budget=budget,
        fingerprint=fingerprint,
        base=base,
        totals=Totals(
            sites_before=before,
            sites_after=after,
            model_before=before + rest,
            model_after=after + rest,
            objective=sum(choice.loss for choice in chosen),
        ),
    )


def _by_name(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if isinstance(options, Mapping):
        return dict(options)
    if is_dataclass(options) and not isinstance(options, type):
        return asdict(options)
    raise InputError(f"options: expected the method's options or a mapping by name; got {options!r}.")
