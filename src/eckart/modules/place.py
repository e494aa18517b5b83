"""What units of maps become, put into a model: the pieces of every map joined, and its layer replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.arch import set_module, site_matrices, site_module
from eckart.layers import narrow_layer
from eckart.modules.method import Piece
from eckart.records import Site


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
