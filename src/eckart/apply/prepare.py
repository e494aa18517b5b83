"""Every site of a model, decomposed by one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.apply.crew import Crew, Job, crew_of, do_all
from eckart.apply.shrinkage import chosen, wants_halves
from eckart.arch import site_matrices
from eckart.compression import CompressMethod, Prepared
from eckart.errors import InputError, problems
from eckart.moments import Moments, SiteMoments
from eckart.records import Progress, Site, silent

Half = Literal["A", "B"]


@dataclass(frozen=True)
class PreparedSite:
    """The decompositions of one site, one per slice, and their joint error curve."""

    site: Site
    slices: tuple[Prepared, ...]
    errors: Tensor
    """(full_rank + 1,): the objective summed over the slices, at rank 0 … full; the predicted rise of the loss for
    methods in that unit."""


def misfits(sites: Sequence[Site], method: CompressMethod) -> list[str]:
    """The reasons why a method cannot take some of the sites."""
    return [f"{site.name}: {why}" for site in sites if (why := method.fits(site)) is not None]


def site_moments(moments: Moments | None, site: Site, index: int, half: Half | None = None) -> SiteMoments | None:
    """The moments of one slice, or None where there are none at all."""
    return None if moments is None else moments.site(site.name, slice=index, half=half)


def check_needs(sites: Sequence[Site], moments: Moments | None, method: CompressMethod) -> None:
    """Raise InputError with every moment that the method uses and the calibration did not collect."""
    if not method.needs:
        return
    if moments is None:
        needs = ", ".join(sorted(method.needs))
        raise InputError(
            f"method {method.name!r} needs moments ({needs}); none were given. "
            "Give calibration data (--data) or a moments file (--moments)."
        )
    names = set(moments.names())
    missing = [site.name for site in sites if site.name not in names]
    if missing:
        raise InputError(
            problems(
                "the moments lack sites that are to be compressed; calibrate again with the same selection",
                missing,
            )
        )
    if method.loss_units and moments.site(sites[0].name).gradient_scale is None:
        raise InputError(
            f"method {method.name!r} weighs errors by output gradients, and these moments were collected without "
            "a backward pass. Calibrate with gradients='full' (or 'scale'), or take method 'whitened', "
            "whose ranks are uniform."
        )


def prepare_site(
    model: nn.Module,
    site: Site,
    moments: Moments | None,
    method: CompressMethod,
    options: Any,
    half: Half | None = None,
) -> PreparedSite:
    """Decompose one site. Cost: what the method's docstring says, once per slice.

    Options that leave ρ to the halves of the calibration look at both, also where ``half`` fits on one of them: the
    choice among six numbers is all that it learns of the other.
    """
    found = [
        prepare_slice(site, weights, index, moments, method, options, half)
        for index, weights in enumerate(site_matrices(model, site))
    ]
    errors = torch.stack([each for _, each in found]).sum(0)
    return PreparedSite(site=site, slices=tuple(part for part, _ in found), errors=errors)


def prepare_slice(
    site: Site,
    weights: Mapping[str, Tensor],
    index: int,
    moments: Moments | None,
    method: CompressMethod,
    options: Any,
    half: Half | None = None,
) -> tuple[Prepared, Tensor]:
    """Decompose one matrix of a site, whose moments are those of slice ``index``; its errors as in PreparedSite."""
    known = site_moments(moments, site, index, half)
    asked = options
    if moments is not None and wants_halves(options):
        halves = (moments.site(site.name, index, "A"), moments.site(site.name, index, "B"))
        asked = chosen(weights, halves, options)
    part = method.prepare(weights, known, asked)
    scale = known.loss_scale if known is not None and method.loss_units else 1.0
    return part, scale * part.errors


def prepare_sites(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Moments | None,
    method: CompressMethod,
    options: Any,
    *,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> dict[str, PreparedSite]:
    """Decompose every site, after all checks that need no computation.

    With a ``crew``, and under ``torchrun``, the processes share the work.
    Raises InputError for sites that the method cannot take and for moments that are missing.
    """
    wrong = misfits(sites, method)
    if wrong:
        raise InputError(problems(f"method {method.name!r} cannot take every site", wrong))
    check_needs(sites, moments, method)
    tasks = [(site, method, options) for site in sites]
    found = prepare_tasks(model, tasks, moments, crew=crew, progress=progress)
    return {part.site.name: part for part in found}


def prepare_tasks(
    model: nn.Module,
    tasks: Sequence[tuple[Site, CompressMethod, Any]],
    moments: Moments | None,
    *,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> list[PreparedSite]:
    """Decompose each site by its method and options. With a ``crew``, and under ``torchrun``, the work is shared."""

    def work(index: int) -> PreparedSite:
        site, method, options = tasks[index]
        return prepare_site(model, site, moments, method, options)

    jobs = [job_of(site, method.name) for site, method, _ in tasks]
    return do_all(crew_of(crew), "decompose", jobs, work, lambda index: given(model, [tasks[index][0]]), progress)


def job_of(site: Site, what: str) -> Job:
    """A decomposition as a job. Its cost is that of the products with Σ and with Wᵀ, in multiply-adds."""
    m, n = site.out_features, site.in_features
    return Job(f"{site.name} {what}", float(site.slices * m * n * (m + n)))


def given(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The weights of some sites, which every process has and none needs to send."""
    return {
        f"{site.name}/{index}/{name}": tensor
        for site in sites
        for index, weights in enumerate(site_matrices(model, site))
        for name, tensor in weights.items()
    }


def curves_of(prepared: Mapping[str, PreparedSite]) -> dict[str, list[float]]:
    """Relative error at every rank, for reports."""
    curves = {}
    for name, part in prepared.items():
        total = float(part.errors[0])
        curves[name] = (part.errors / total).tolist() if total > 0 else [0.0] * len(part.errors)
    return curves
