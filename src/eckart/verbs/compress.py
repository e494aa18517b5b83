"""``eckart.compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.apply import apply_plan, curves_of
from eckart.apply.decide import decide, equal_shares
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.compression import get_method, options_for
from eckart.errors import InputError
from eckart.hf.models import LoadedModel
from eckart.moments import Moments
from eckart.planning import Allocation, Plan
from eckart.records import Budget, FormKind, Outcome, Progress, Site, silent
from eckart.verbs.calibrate import Gradients, calibrate_sites
from eckart.verbs.models import DataLike, ModelLike, as_loaded
from eckart.verbs.plan import DEFAULT_METHOD, FORMS, as_moments, budget_from


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model and how it came about."""

    loaded: LoadedModel
    """The compressed model with its tokenizer."""
    plan: Plan
    outcome: Outcome
    base_fingerprint: str
    curves: Mapping[str, Sequence[float]]
    """Relative error of every planned site at rank 0, 1, …, where they were computed."""
    calibration: Mapping[str, Any]
    """What the moments were collected on; empty where there were none."""

    @property
    def model(self) -> Any:
        """The compressed module."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer


def compress(
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
    rank_multiple: int = 1,
    min_rank: int = 1,
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
    inplace: bool = False,
    certify: bool = True,
    progress: Progress = silent,
) -> Compressed:
    """Compress a model under a budget or a plan.

    Statistics come from ``data`` (see :func:`eckart.calibrate`) or from ``moments``; ranks from ``plan`` or from
    ``method`` and a budget (see :func:`eckart.plan`). A module in memory is left as it is, and a copy
    is compressed, unless ``inplace``. ``certify`` also fits every map on one half of the calibration and measures
    it on the other.

    Raises InputError with everything that is wrong before any long work, NotFiniteError, BudgetError.
    """
    start = time.perf_counter()
    if data is not None and moments is not None:
        raise InputError("data and moments exclude each other: moments are what calibrating on data gave.")
    if plan is not None and (
        method is not None or options or keep is not None or budget is not None or allocation is not None
    ):
        raise InputError("a plan decides methods, options, ranks and allocation; leave those out beside plan=.")
    wanted = None if plan is not None else budget_from(keep, budget)
    given = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    chosen = get_method(method or DEFAULT_METHOD)
    chosen_options = options_for(chosen, options or {})
    known = as_moments(moments)

    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    if not isinstance(model, (str, os.PathLike)) and not inplace:
        loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    base_print = fingerprint(loaded.model)
    if given is not None:
        given.check_model(base_print)
    if known is not None:
        known.check(base_print)
    sites = _sites_of(loaded, given, include, exclude, embeddings, head)
    if wanted is not None and wanted.loss is None:
        equal_shares(loaded.model, sites, wanted, forms, rank_multiple, min_rank)
    check_finite(loaded.model, sites)
    if data is not None:
        known = calibrate_sites(
            loaded,
            sites,
            data,
            part=part,
            field=field,
            samples=samples,
            length=length,
            batch_size=batch_size,
            gradients=gradients,
            probes=probes,
            seed=seed,
            progress=progress,
        )
    prepared = None
    if given is None and wanted is not None:
        given, prepared = decide(
            loaded.model,
            sites,
            known,
            method=chosen,
            options=chosen_options,
            budget=wanted,
            allocation=allocation,
            forms=forms,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            fingerprint=base_print,
            base=loaded.name,
            progress=progress,
        )
    if given is None:
        raise InputError("neither a plan nor a budget was given.")
    outcome = apply_plan(loaded.model, given, sites, known, prepared=prepared, certify=certify, progress=progress)
    return Compressed(
        loaded=dataclasses.replace(loaded, path=None),
        plan=given,
        outcome=dataclasses.replace(outcome, seconds=time.perf_counter() - start),
        base_fingerprint=base_print,
        curves=curves_of(prepared) if prepared is not None else {},
        calibration={} if known is None else known.meta,
    )


def _sites_of(
    loaded: LoadedModel,
    plan: Plan | None,
    include: Sequence[str],
    exclude: Sequence[str],
    embeddings: bool,
    head: bool,
) -> tuple[Site, ...]:
    """The sites that a plan speaks of, or those that are selected."""
    if plan is None:
        return find_sites(loaded.model, include=include, exclude=exclude, embeddings=embeddings, head=head)
    if include or exclude or embeddings or head:
        raise InputError("a plan names its sites; leave out include, exclude, embeddings and head.")
    named = {step.site for step in plan.steps}
    inner = {site.name for site in find_sites(loaded.model)}
    everything = find_sites(loaded.model, embeddings=True, head=True)
    return tuple(site for site in everything if site.name in named or site.name in inner)
