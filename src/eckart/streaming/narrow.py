"""Units that become narrower, each cut to a width that is known before, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.apply.units import held_out_unit, prepare_units, unit_error
from eckart.checkpoint.weights import Mark, read_tensors
from eckart.modules import ModuleMethod, Piece, UnitFacts
from eckart.moments import Moments
from eckart.records import Site
from eckart.streaming.factors import write_tensors

_SIDES = ("rows", "columns")
_PARTS = ("weight", "bias", "positions")


@dataclass(frozen=True)
class UnitFigures:
    """What a unit lost at its width."""

    loss: float
    """The method's objective."""
    predicted: float
    held_out: float | None
    carrier: str
    """The map to which the loss is put down."""


def needed(each: UnitFacts) -> tuple[str, ...]:
    """The maps of a unit whose moments its method looks at: what the last map reads, or both of queries and keys."""
    return each.unit.sites if each.unit.kind == "queries" else each.unit.sites[-1:]


def cut_to_file(
    path: Path,
    model: nn.Module,
    each: UnitFacts,
    width: int,
    sites: Sequence[Site],
    moments: Moments,
    method: ModuleMethod,
    options: Any,
    *,
    certify: bool,
) -> tuple[Mark, float]:
    """Prepare a unit, cut it and write its pieces, in float32 (float64 for float64 weights)."""
    by_name = {site.name: site for site in sites}
    part = prepare_units(model, [each], sites, moments, method, options)[each.unit.name]
    predicted = unit_error(model, by_name, part, width, moments, None)
    held_out = held_out_unit(model, sites, each, width, moments, method, options) if certify else None
    figures = [float(part.errors[width]), predicted, -1.0 if held_out is None else held_out]
    carrier = part.stand_in(width)[0]
    tensors = {"figures": torch.tensor(figures, dtype=torch.float64)}
    tensors["carrier"] = torch.tensor([each.unit.sites.index(carrier)])
    store = torch.promote_types(model.get_submodule(carrier).get_parameter("weight").dtype, torch.float32)
    for i, piece in enumerate(part.cut(width)):
        place = [each.unit.sites.index(piece.site), _SIDES.index(piece.side), piece.start, piece.stop]
        tensors[f"{i}/place"] = torch.tensor(place)
        for name in _PARTS:
            value = getattr(piece, name)
            if value is not None:
                tensors[f"{i}/{name}"] = value.to(store) if value.is_floating_point() else value
    return write_tensors(path, tensors)


def read_figures(path: Path, each: UnitFacts) -> UnitFigures:
    """What :func:`cut_to_file` found."""
    tensors = read_tensors(path)
    loss, predicted, held_out = (float(value) for value in tensors["figures"])
    carrier = each.unit.sites[int(tensors["carrier"])]
    return UnitFigures(loss, predicted, None if held_out < 0 else held_out, carrier)


def read_pieces(path: Path, each: UnitFacts) -> list[Piece]:
    """The pieces of a unit's maps."""
    tensors = read_tensors(path)
    found: list[Piece] = []
    while f"{len(found)}/place" in tensors:
        i = len(found)
        site, side, start, stop = tensors[f"{i}/place"].tolist()
        parts: Mapping[str, Any] = {name: tensors.get(f"{i}/{name}") for name in _PARTS}
        found.append(
            Piece(
                site=each.unit.sites[site],
                side="rows" if _SIDES[side] == "rows" else "columns",
                start=start,
                stop=stop,
                **{
                    name: value.to(torch.float64) if value is not None and value.is_floating_point() else value
                    for name, value in parts.items()
                },
            )
        )
    return found
