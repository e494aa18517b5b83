"""What every map and every unit of a model may become, and what each of that costs and loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from eckart.apply.bits import dense_noises, metric_of, quantisable, site_bits, unit_bits
from eckart.apply.prepare import PreparedSite
from eckart.apply.sparse import Fit, fitted, sparse_choices
from eckart.arch import site_matrices, site_module
from eckart.compression import kfac
from eckart.errors import InputError
from eckart.layers import supported_forms, unsupported
from eckart.modules import PreparedUnit, UnitFacts
from eckart.moments import Moments
from eckart.planning import Choice, Choices, Curve, Group, choices_for, unit_choices
from eckart.planning.curve import INDEX_BYTES
from eckart.records import FormKind, Site, Size, Unit


def element_size(model: nn.Module, site: Site) -> int:
    """Bytes per number of the site's weight."""
    return next(site_module(model, site).parameters()).element_size()


def forms_of(model: nn.Module, site: Site, forms: Sequence[FormKind]) -> tuple[FormKind, ...]:
    """Those of the wanted forms that the site can have."""
    if unsupported(site_module(model, site)) is not None:
        return ("dense",)
    return tuple(form for form in forms if form in supported_forms(site)) or ("dense",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Everything that choices are made from."""

    model: nn.Module
    sites: Sequence[Site]
    moments: Moments | None
    prepared: Mapping[str, PreparedSite]
    """Without one, a site stays as it is, or loses in proportion."""
    units: Mapping[str, UnitFacts]
    cut: Mapping[str, PreparedUnit]
    forms: tuple[FormKind, ...]
    bits: tuple[int, ...]
    rank_multiple: int
    min_rank: int
    _fits: dict[str, tuple[int, Fit]] = field(default_factory=dict, repr=False)

    def sparse_fit(self, site: Site, kept: int) -> Fit:
        """The site with so many weights in every row. The last one of each site is kept for the probes."""
        known = self._fits.get(site.name)
        if known is None or known[0] != kept:
            if self.moments is None:
                raise InputError(f"{site.name}: zeros are chosen by moments; there are none.")
            fit = fitted(site_matrices(self.model, site)[0], self.moments.site(site.name), kept)
            known = self._fits[site.name] = (kept, fit)
        return known[1]

    def groups(self) -> list[Group]:
        """One group for each site on its own, and for sites that units hold together."""
        noises: dict[str, dict[int, float]] = {}
        curves = {site.name: self._site_curve(site, noises) for site in self.sites}
        clusters = _clusters([each.unit.sites for each in self.units.values()])
        found = []
        for cluster in clusters:
            inside = [each for each in self.units.values() if each.unit.sites[0] in cluster]
            narrow = tuple(self._unit_curve(each, noises) for each in inside)
            alone = tuple(curves[site.name] for site in self.sites if site.name in cluster)
            left = _less([curve.choices.whole for curve in alone], [curve.choices.whole for curve in narrow])
            if left.parameters:  # rows of a fused map that no unit holds stay as they are
                narrow = (*narrow, _unchanged(inside[0].unit, left))
            found.append(Group((alone, narrow)))
        taken = {name for cluster in clusters for name in cluster}
        order = {site.name: i for i, site in enumerate(self.sites)}
        found += [Group.single(curves[site.name]) for site in self.sites if site.name not in taken]
        return sorted(found, key=lambda group: order[group.alternatives[0][0].site.name])

    def _site_curve(self, site: Site, noises: dict[str, dict[int, float]]) -> Curve:
        size = element_size(self.model, site)
        part = self.prepared.get(site.name)
        errors = np.linspace(1.0, 0.0, site.full_rank + 1) if part is None else part.errors.numpy()
        choices = choices_for(
            site,
            errors,
            forms=forms_of(self.model, site, self.forms),
            rank_multiple=self.rank_multiple,
            min_rank=self.min_rank,
            bytes_per_number=size,
        )
        if self.bits and part is not None and self.moments is not None and quantisable(site):
            weights = site_matrices(self.model, site)[0]
            metric = metric_of(weights, self.moments.site(site.name), kfac.Options())
            choices = site_bits(part, choices, metric, self.bits, size)
            noises[site.name] = dense_noises(weights["weight"], metric, self.bits)
        if "sparse" in self.forms and self.moments is not None and quantisable(site):
            zeros = sparse_choices(
                site,
                site_matrices(self.model, site)[0],
                self.moments.site(site.name),
                self.bits,
                size,
                choices.whole,
            )
            choices = Choices.joined([choices, zeros])
        return Curve(site=site, choices=choices)

    def _unit_curve(self, each: UnitFacts, noises: Mapping[str, Mapping[int, float]]) -> Curve:
        unit = each.unit
        size = element_size(self.model, next(site for site in self.sites if site.name == unit.sites[0]))
        part = self.cut.get(unit.name)
        errors = np.linspace(1.0, 0.0, unit.full_rank + 1) if part is None else part.errors.numpy()
        choices = unit_choices(
            unit, errors, multiple=self.rank_multiple, min_width=self.min_rank, bytes_per_number=size
        )
        owners = [other for other in self.units.values() if set(other.unit.sites) & set(unit.sites)]
        if len(owners) > 1 and unit.width_indices:
            # Beside rows of a fused map that another unit drops, the rows that all stay are stored with their places.
            choices.bytes[-1] += unit.full_rank * sum(rows for rows, _ in unit.width_rows) * INDEX_BYTES
        # Rows of one fused map cannot differ in bits: there only whole maps are quantised.
        if self.bits and len(owners) == 1 and all(name in noises for name in unit.sites):
            dense = {width: sum(noises[name][width] for name in unit.sites) for width in self.bits}
            choices = unit_bits(unit, choices, dense, self.bits, size)
        return Curve(site=unit, choices=choices)


def _less(whole: Sequence[Size], parts: Sequence[Size]) -> Size:
    return Size(
        parameters=sum(size.parameters for size in whole) - sum(size.parameters for size in parts),
        bytes=sum(size.bytes for size in whole) - sum(size.bytes for size in parts),
        macs=sum(size.macs for size in whole) - sum(size.macs for size in parts),
    )


def _unchanged(unit: Unit, size: Size) -> Curve:
    """A curve of one choice, of no site."""
    rest = replace(unit, name=f"{unit.name}-rest", sites=())
    return Curve(site=rest, choices=Choices.of([Choice("dense", unit.full_rank, size, 0.0)], whole=size))


def _clusters(parts: Sequence[Sequence[str]]) -> list[set[str]]:
    """Sets of names that share members, joined."""
    found: list[set[str]] = []
    for names in parts:
        touching = [cluster for cluster in found if cluster & set(names)]
        found = [cluster for cluster in found if cluster not in touching]
        found.append(set(names).union(*touching))
    return found
