"""Which weights a training-time method works on, and the factored layers that it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eckart.arch import find_sites, get_module, set_module, site_module, site_size
from eckart.errors import InputError, problems
from eckart.forms import LowRank
from eckart.layers import layer_from_forms, unsupported
from eckart.records import LayerOutcome, Outcome, Rank, Site, Size


def trainable_sites(
    model: nn.Module,
    *,
    sites: Sequence[Site] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    method: str,
) -> tuple[Site, ...]:
    """The sites given, or those that :func:`eckart.arch.find_sites` finds, checked.

    Raises InputError for patterns beside ``sites``, and with every site that cannot be factored in training: an
    embedding, a weight that modules share, a module that no factored layer can replace.
    """
    if sites is not None and (include or exclude):
        raise InputError(f"{method}: give either sites or patterns (include, exclude), not both.")
    found = tuple(sites) if sites is not None else find_sites(model, include=include, exclude=exclude)
    if not found:
        raise InputError(f"{method}: the model has no linear map to work on.")
    wrong = [f"{site.name}: {reason}" for site in found if (reason := _unfit(model, site)) is not None]
    if wrong:
        raise InputError(problems(f"{method} cannot train these sites; exclude them", wrong))
    return found


def _unfit(model: nn.Module, site: Site) -> str | None:
    if site.kind == "embedding":
        return "an embedding table"
    if site.tied:
        return f"its weight is shared with {', '.join(site.tied)}"
    return unsupported(site_module(model, site))


def parameter_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The parameter that holds the weight of a site."""
    name = site.name.rpartition(".")[2] if site.kind == "experts" else "weight"
    return site_module(model, site).get_parameter(name)


def pays(rank: int, shape: tuple[int, int]) -> bool:
    """Whether two factors of this rank take fewer numbers than a dense matrix (out, in) of ``shape``."""
    m, n = shape
    return rank * (m + n) < m * n


def chosen_rank(S: Tensor, shape: tuple[int, int], rank: Rank) -> int:
    """What a Rank means for singular values S (never rising) of a matrix of ``shape``: from 1 to len(S)."""
    if rank.keep is not None:
        return min(rank.keep, len(S))
    if rank.ratio is not None:
        m, n = shape
        return min(max(1, int(rank.ratio * m * n / (m + n))), len(S))
    kept = S.double().square().cumsum(0)
    return min(int((kept < (rank.energy or 0.0) * kept[-1]).sum()) + 1, len(S))


def rank_words(rank: Rank) -> str:
    """A Rank as an outcome names it."""
    if rank.keep is not None:
        return f"rank {rank.keep}"
    if rank.ratio is not None:
        return f"{rank.ratio:g} of the parameters of each site"
    return f"energy {rank.energy:g}"


def put_factors(model: nn.Module, site: Site, forms: Sequence[LowRank]) -> None:
    """Replaces the module of a site by the layer that its forms describe, one form per slice."""
    path = site.name.rpartition(".")[0] if site.kind == "experts" else site.name
    with torch.no_grad():
        set_module(model, path, layer_from_forms(site, get_module(model, path), forms))


def layer_outcome(
    site: Site, element_size: int, rank: int | None, shape: tuple[int, int], error: float = 0.0
) -> LayerOutcome:
    """What became of a site: two factors of ``rank`` for matrices (out, in) of ``shape``, or dense where it is None.

    ``error`` is the relative squared error ‖W − Ŵ‖² / ‖W‖² of the cut at the end.
    """
    numbers = site.weight_parameters if rank is None else site.slices * rank * sum(shape)
    return LayerOutcome(
        site=site,
        form="dense" if rank is None else "lowrank",
        rank=site.full_rank if rank is None else rank,
        before=site_size(site, element_size),
        after=Size(parameters=numbers, bytes=numbers * element_size, macs=numbers),
        predicted=error,
    )


def outcome_of(
    layers: Sequence[LayerOutcome], model_before: Size, model_after: Size, *, method: str, budget: str, started: float
) -> Outcome:
    """The record of the whole; ``started`` is the ``time.perf_counter()`` at which the work began."""
    nothing = Size(parameters=0, bytes=0, macs=0)
    return Outcome(
        layers=tuple(layers),
        sites_before=sum((layer.before for layer in layers), nothing),
        sites_after=sum((layer.after for layer in layers), nothing),
        model_before=model_before,
        model_after=model_after,
        predicted_loss=None,
        method=method,
        budget=budget,
        seconds=time.perf_counter() - started,
    )
