"""``eckart.preview``: what a compression would cost and give, before any long work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from eckart.apply.choices import element_size
from eckart.apply.decide import check_allocation, default_allocation, equal_shares, equal_widths
from eckart.apply.sparse import sparse_size
from eckart.apply.units import units_of
from eckart.arch import check_finite, find_sites, fingerprint, model_size, site_size
from eckart.compression import options_for
from eckart.errors import InputError, problems
from eckart.modules import KNOWN_KINDS, ModuleMethod
from eckart.moments import Moments
from eckart.planning import Allocation, Plan, check, choices_for
from eckart.records import Budget, FormKind, Progress, Site, Size, Unit, silent
from eckart.verbs.calibrate import Gradients
from eckart.verbs.models import DataLike, ModelLike, as_loaded
from eckart.verbs.plan import DEFAULT_METHOD, FORMS, any_method, as_moments, bits_from, budget_from, rounds_from

DOUBLE = 8
"""Bytes of a float64 number."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """An estimate. Ranks are those of equal shares at every site; a global budget will move them."""

    steps: tuple[Mapping[str, Any], ...]
    """site, form, rank, out, in, parameters before and after; empty where only a calibration is previewed."""
    sites_before: Size
    sites_after: Size
    model_before: Size
    model_after: Size
    moments_bytes: int
    """What the moments take in memory and, at most, on disk."""
    peak_memory_bytes: int
    """Model, moments and the work space of the largest decomposition; batches come on top."""
    disk_bytes: int
    """What will be written."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def preview(
    model: ModelLike,
    *,
    tokenizer: Any = None,
    data: DataLike | None = None,
    moments: Moments | str | None = None,
    plan: Plan | str | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    keep: float | None = None,
    budget: Budget | None = None,
    allocation: Allocation | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    head: bool = False,
    forms: Sequence[FormKind] = FORMS,
    bits: Sequence[int] | None = None,
    rank_multiple: int = 1,
    min_rank: int = 1,
    probe_rounds: int | None = None,
    part: str = "calibration",
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    gradients: Gradients = "full",
    probes: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Preview:
    """Check everything that needs no computation and say what ``compress`` (or ``calibrate``) would take.

    Same arguments as :func:`eckart.compress`; without budget and plan only the calibration is previewed.
    Raises the same errors as the real run does before its long work.
    """
    chosen = any_method(method or DEFAULT_METHOD)
    chosen_options = options_for(chosen, options or {})
    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    given = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    everything = given is not None
    sites = find_sites(
        loaded.model,
        include=include,
        exclude=exclude,
        embeddings=embeddings or everything,
        head=head or everything,
    )
    if given is not None:
        given.check_model(fingerprint(loaded.model))
        check(given, sites, [each.unit for each in units_of(loaded.model, sites, None)])
        units = {each.unit.name: each.unit for each in units_of(loaded.model, sites, None)}
        named = {
            name for step in given.steps for name in (units[step.site].sites if step.site in units else [step.site])
        }
        sites = tuple(site for site in sites if site.name in named)
    check_finite(loaded.model, sites)
    known = as_moments(moments)
    if known is not None:
        known.check(fingerprint(loaded.model))
    before = model_size(loaded.model)
    dense = {site.name: site_size(site, element_size(loaded.model, site)) for site in sites}
    nothing = Size(parameters=0, bytes=0, macs=0)
    sites_before = sum(dense.values(), nothing)
    notes = []
    picked: Mapping[str, tuple[FormKind, int, Size]]
    places: Sequence[Site | Unit] = sites
    if given is not None:
        picked = _planned(given, sites, loaded.model)
    elif keep is None and budget is None:
        picked = {}
    else:
        wanted = budget_from(keep, budget)
        width = bits_from(bits, wanted, chosen, allocation)
        rounds_from(probe_rounds, data is not None, wanted, chosen, allocation)
        check_allocation(chosen, allocation, wanted, width, forms)
        if wanted.loss is not None:
            raise InputError("a ceiling on the loss cannot be previewed: its ranks need the moments.")
        if (allocation or default_allocation(chosen)) != "uniform":
            notes.append("ranks are shown at equal shares; the real run moves them between sites")
        if isinstance(chosen, ModuleMethod):
            places, picked = equal_widths(
                loaded.model, sites, wanted, chosen, chosen_options, allocation, rank_multiple, min_rank
            )
        else:
            wrong = [f"{site.name}: {why}" for site in sites if (why := chosen.fits(site))]
            if wrong:
                raise InputError(problems(f"method {chosen.name!r} cannot take every site", wrong))
            if width:
                notes.append("bits are chosen in the real run; the sizes shown are without")
            if "sparse" in forms:
                notes.append("zeros are chosen in the real run; what is shown is without")
            factors = "sparse" not in forms or {"lowrank", "pivoted"} & set(forms)
            picked = equal_shares(loaded.model, sites, wanted, forms, rank_multiple, min_rank) if factors else {}
    sites_after = sum((size for _, _, size in picked.values()), nothing) if picked else sites_before
    after = Size(
        parameters=before.parameters - sites_before.parameters + sites_after.parameters,
        bytes=before.bytes - sites_before.bytes + sites_after.bytes,
        macs=before.macs - sites_before.macs + sites_after.macs,
    )
    collected = 0 if data is None and known is None else _moments_bytes(sites, gradients)
    largest = max((_work_bytes(site) for site in sites), default=0)
    return Preview(
        steps=tuple(_row(place, picked[place.name], dense.get(place.name)) for place in places if picked),
        sites_before=sites_before,
        sites_after=sites_after,
        model_before=before,
        model_after=after,
        moments_bytes=collected,
        peak_memory_bytes=before.bytes + collected + largest + (_factor_bytes(sites) if picked else 0),
        disk_bytes=after.bytes if picked else collected,
        notes=tuple(notes),
    )


def _row(place: Site | Unit, picked: tuple[FormKind, int, Size], dense: Size | None) -> dict[str, Any]:
    form, rank, size = picked
    shape: dict[str, int | None] = {"out": None, "in": None}
    if isinstance(place, Unit):
        before = place.full_rank * place.width_parameters
    else:
        shape = {"out": place.out_features, "in": place.in_features}
        before = 0 if dense is None else dense.parameters
    return {
        "site": place.name,
        **shape,
        "form": form,
        "rank": rank,
        "parameters_before": before,
        "parameters_after": size.parameters,
    }


def _planned(plan: Plan, sites: Sequence[Site], model: Any) -> dict[str, tuple[FormKind, int, Size]]:
    """Form, rank and size of every site; those of a narrower unit share what it loses, bits are left out."""
    steps = {step.site: step for step in plan.steps}
    units = {each.unit.name: each.unit for each in units_of(model, sites, KNOWN_KINDS)}
    found: dict[str, tuple[FormKind, int, Size]] = {}
    for site in sites:
        whole = site_size(site, element_size(model, site))
        step = steps.get(site.name)
        if step is None or step.form == "dense":
            found[site.name] = ("dense", site.full_rank, whole)
            continue
        if step.form == "sparse":
            found[site.name] = ("sparse", step.rank, sparse_size(site, step.rank, step.bits, element_size(model, site)))
            continue
        choices = choices_for(
            site,
            numpy.zeros(site.full_rank + 1),
            scale=1.0,
            forms=(step.form,),
            rank_multiple=1,
            min_rank=1,
            bytes_per_number=element_size(model, site),
        )
        chosen = next(c for c in choices if c.form == step.form and c.rank == step.rank)
        found[site.name] = (step.form, step.rank, chosen.size)
    for step in plan.steps:
        if step.form != "narrow" or step.site not in units:
            continue
        unit = units[step.site]
        lost = (unit.full_rank - step.rank) * unit.width_parameters / sum(found[n][2].parameters for n in unit.sites)
        for name in unit.sites:
            before = found[name][2]
            left = Size(
                parameters=round(before.parameters * (1 - lost)),
                bytes=round(before.bytes * (1 - lost)),
                macs=round(before.macs * (1 - lost)),
            )
            found[name] = ("narrow", step.rank, left)
    return found


def _moments_bytes(sites: Sequence[Site], gradients: str) -> int:
    """Both halves, in float64, not counting that sites share inputs: an upper bound."""
    total = 0
    for site in sites:
        n, m = site.in_features, site.out_features
        inputs = n if site.kind == "embedding" else n * n
        outputs = {"full": m * m, "scale": 1, "none": 0}[gradients]
        total += 2 * site.slices * (inputs + outputs) * DOUBLE
    return total


def _work_bytes(site: Site) -> int:
    """Matrices of one decomposition: K, its eigenvectors, a root, and the products with W."""
    small = site.full_rank
    return DOUBLE * (4 * small * small + 4 * site.out_features * site.in_features)


def _factor_bytes(sites: Sequence[Site]) -> int:
    """The decompositions of all sites, which are kept until ranks are decided."""
    return sum(DOUBLE * s.slices * s.full_rank * (s.out_features + s.in_features) for s in sites)
