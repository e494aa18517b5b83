"""Units of maps that become narrower together: prepared, and carried out on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eckart.apply.crew import Crew, Job, do_all
from eckart.apply.error import relative_error
from eckart.apply.prepare import Half, given
from eckart.arch import site_matrices
from eckart.errors import InputError
from eckart.modules import ALL_KINDS, KNOWN_KINDS, ModuleMethod, PreparedUnit, UnitFacts, module_units
from eckart.moments import Moments, SiteMoments
from eckart.records import Progress, Site, silent


def units_of(model: nn.Module, sites: Sequence[Site], parts: Sequence[str] | None) -> list[UnitFacts]:
    """The units of some kinds whose maps are all among the sites; None: of all but heads."""
    kinds = [kind for kind in KNOWN_KINDS if kind in (ALL_KINDS if parts is None else parts)]
    return module_units(model, sites, kinds)[0]


def prepare_units(
    model: nn.Module,
    units: Sequence[UnitFacts],
    sites: Sequence[Site],
    moments: Moments | None,
    method: ModuleMethod,
    options: Any,
    *,
    half: Half | None = None,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> dict[str, PreparedUnit]:
    """Look at every unit once; with a ``crew`` its processes share them.

    Raises InputError where there are no moments, or none of its maps.
    """
    if moments is None:
        raise InputError(f"method {method.name!r} needs moments; give calibration data (--data) or a moments file.")
    by_name = {site.name: site for site in sites}

    def work(index: int) -> PreparedUnit:
        each = units[index]
        weights = {name: site_matrices(model, by_name[name])[0] for name in each.unit.sites}
        known: dict[str, SiteMoments] = {
            name: moments.site(name, half=half) for name in each.unit.sites if name in moments.input_of
        }
        return method.prepare(each, weights, known, options)

    def there(index: int) -> dict[str, Tensor]:
        return given(model, [by_name[name] for name in units[index].unit.sites])

    jobs = [Job(f"{each.unit.name} {method.name}", float(each.unit.full_rank**3)) for each in units]
    found = do_all(crew, "narrow", jobs, work, there, progress)
    return {each.unit.name: part for each, part in zip(units, found, strict=True)}


def unit_error(
    model: nn.Module, sites: Mapping[str, Site], prepared: PreparedUnit, width: int, moments: Moments, half: Half | None
) -> float:
    """Relative error of the unit's stand-in under its map's metrics, in [0, 1]."""
    name, dense, _ = prepared.stand_in(width)
    weights = site_matrices(model, sites[name])[0]
    known = moments.site(name, half=half)
    return relative_error(weights["weight"], dense, known, centred="bias" in weights)


def held_out_unit(
    model: nn.Module,
    sites: Sequence[Site],
    unit: UnitFacts,
    width: int,
    moments: Moments,
    method: ModuleMethod,
    options: Any,
) -> float | None:
    """The relative error on half B of what half A alone would have given."""
    try:
        part = prepare_units(model, [unit], sites, moments, method, options, half="A")[unit.unit.name]
        return unit_error(model, {site.name: site for site in sites}, part, width, moments, "B")
    except (InputError, RuntimeError):  # half A alone can be too little to factorise
        return None
