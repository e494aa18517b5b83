"""Blocks with fewer neurons or heads, all of one width, out of moments: how :mod:`eckart.modules` is called here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from eckart.arch import check_finite, find_sites, fingerprint, site_matrices
from eckart.errors import BudgetError, InputError, problems
from eckart.modules import Piece, PreparedUnit, UnitFacts, module_units, narrow_sites, obs, replace_narrow
from eckart.moments import Moments, SiteMoments
from eckart.records import Site

WidthKind = Literal["neurons", "heads"]


def width_units(
    model: nn.Module, kind: WidthKind, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[UnitFacts], dict[str, Site]]:
    """The MLPs or attentions that can become narrower, and the sites of their maps by name.

    ``include`` and ``exclude`` as :func:`eckart.arch.find_sites` takes them; a block of which they leave out a map
    stays as it is. Raises InputError where nothing is left, with the reasons.
    """
    sites = {site.name: site for site in find_sites(model, include=include, exclude=exclude)}
    units, skipped = module_units(model, list(sites.values()), [kind])
    if not units:
        reasons = [f"{name or type(model).__name__}: {reason}" for name, reason in skipped]
        what = "MLP" if kind == "neurons" else "attention"
        reasons = reasons or [f"all maps of an {what} have to be selected, and of none they are"]
        raise InputError(problems(f"no {what} of this model can lose {kind}", reasons))
    names = [name for unit in units for name in unit.unit.sites]
    return units, {name: sites[name] for name in sites if name in names}


def kept_width(unit: UnitFacts, keep: float) -> int:
    """⌊keep · width⌋. Raises BudgetError where nothing would stay."""
    full = unit.unit.full_rank
    found = int(keep * full + 1e-9)
    if not found:
        raise BudgetError(
            f"{unit.unit.name}: keep={keep:g} of {full} is less than one; take at least {1 / full:.4g}"
            + (", or another pattern: all its queries share one head of keys and values." if full == 1 else ".")
        )
    return found


def narrowed_widths(
    model: nn.Module,
    moments: Moments,
    kind: WidthKind,
    keep: float,
    *,
    refit: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, tuple[PreparedUnit, int]]:
    """Take the least useful neurons or heads out of every block, in place; every unit by its name, with its width.

    ``keep``: share of the width of each block, in (0, 1]; met from below. Without ``refit`` what stays keeps its
    weights. Raises InputError, with everything that is wrong, BudgetError where a block would be left empty,
    MismatchError for moments of another model, NotFiniteError; the model is then as it was.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise InputError(f"keep is a share in (0, 1]; got {keep!r}.")
    moments.check(fingerprint(model))
    units, sites = width_units(model, kind, include, exclude)
    check_finite(model, sites.values())
    widths = {unit.unit.name: kept_width(unit, keep) for unit in units}
    prepared: dict[str, tuple[PreparedUnit, int]] = {}
    pieces: list[Piece] = []
    for unit in units:
        weights = {name: site_matrices(model, sites[name])[0] for name in unit.unit.sites}
        known: Mapping[str, SiteMoments] = {
            name: moments.site(name) for name in unit.unit.sites if name in moments.input_of
        }
        part = obs.METHOD.prepare(unit, weights, known, obs.Options(parts=(kind,), refit=refit))
        prepared[unit.unit.name] = part, widths[unit.unit.name]
        pieces += part.cut(widths[unit.unit.name])
    with torch.no_grad():
        for name, narrow in narrow_sites(model, sites, pieces).items():
            replace_narrow(model, sites[name], narrow)
    return prepared
