"""Units of maps that become narrower together: prepared, and carried out on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.apply.crew import Crew, Job, do_all
from eckart.apply.error import relative_error
from eckart.apply.prepare import Half, given
from eckart.arch import set_module, site_matrices, site_module
from eckart.errors import InputError
from eckart.layers import narrow_layer
from eckart.modules import ALL_KINDS, ModuleMethod, Piece, PreparedUnit, UnitFacts, module_units
from eckart.moments import Moments, SiteMoments
from eckart.records import Progress, Site, silent


def units_of(model: nn.Module, sites: Sequence[Site], parts: Sequence[str] | None) -> list[UnitFacts]:
    """The units of some kinds whose maps are all among the sites."""
    kinds = [kind for kind in ALL_KINDS if parts is None or kind in parts]
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


@dataclass(frozen=True, eq=False)
class NarrowSite:
    """What one map becomes: its matrix, its bias, and the places of what is left."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None = None
    columns: Tensor | None = None
    blocks: int = 1


def narrow_sites(model: nn.Module, sites: Mapping[str, Site], cuts: Sequence[Piece]) -> dict[str, NarrowSite]:
    """The maps that several units change together; a fused map keeps the rows that no unit replaces."""
    by_site: dict[str, list[Piece]] = {}
    for piece in cuts:
        by_site.setdefault(piece.site, []).append(piece)
    found = {}
    for name, pieces in by_site.items():
        if pieces[0].side == "columns":
            (one,) = pieces
            found[name] = NarrowSite(one.weight, one.bias, columns=one.positions)
        else:
            old = {k: v.to("cpu", torch.float64) for k, v in site_matrices(model, sites[name])[0].items()}
            found[name] = _joined(old, sorted(pieces, key=lambda piece: piece.start))
    return found


def _joined(old: Mapping[str, Tensor], pieces: Sequence[Piece]) -> NarrowSite:
    """The rows of a map out of pieces, and of what lies between them."""
    weight, bias = old["weight"], old.get("bias")
    rows, biases, places = [], [], []
    at = 0
    for piece in [*pieces, None]:
        start = len(weight) if piece is None else piece.start
        if start > at:
            rows.append(weight[at:start])
            biases.append(None if bias is None else bias[at:start])
            places.append(torch.arange(at, start))
        if piece is not None:
            rows.append(piece.weight)
            biases.append(piece.bias)
            places.append(piece.positions if piece.positions is not None else torch.arange(len(piece.weight)))
            at = piece.stop
    joined = None
    if any(part is not None for part in biases):
        zeros = [row.new_zeros(len(row)) for row in rows]
        joined = torch.cat([zero if part is None else part for part, zero in zip(biases, zeros, strict=True)])
    ordered = pieces[0].positions is None
    return NarrowSite(
        weight=torch.cat(rows),
        bias=joined,
        rows=None if ordered else torch.cat(places),
        blocks=len(pieces) if ordered else 1,
    )


def replace_narrow(model: nn.Module, site: Site, narrow: NarrowSite) -> None:
    """Put the narrower map in its place."""
    layer = narrow_layer(
        site_module(model, site),
        narrow.weight,
        narrow.bias,
        rows=narrow.rows,
        columns=narrow.columns,
        blocks=narrow.blocks,
    )
    set_module(model, site.name, layer)


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
