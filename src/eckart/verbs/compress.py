"""``eckart.compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.apply import apply_plan, curves_of
from eckart.apply.crew import crew_of
from eckart.apply.decide import check_allocation, check_budget, decide
from eckart.apply.queue import Queue
from eckart.apply.refit import check_blend, refit
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.compression import METHODS, CompressMethod, Need, options_for
from eckart.errors import InputError
from eckart.hf.distance import distance_from_now
from eckart.hf.models import LoadedModel
from eckart.modules import MODULES, ModuleMethod
from eckart.moments import Moments
from eckart.moments.distributed import join
from eckart.planning import Allocation, Plan
from eckart.records import Budget, FormKind, Outcome, Progress, Site, silent
from eckart.verbs.calibrate import Gradients, calibrate_sites
from eckart.verbs.models import DataLike, ModelLike, as_batches, as_loaded
from eckart.verbs.plan import DEFAULT_METHOD, FORMS, any_method, as_moments, bits_from, budget_from, rounds_from

PROBE_SAMPLES = {"embedding": 32, "causal-lm": 16, "masked-lm": 16, "logits": 16}
"""Rows of the calibration data that every probe runs on."""
PROBE_ROWS = 4
"""At a time: their logits stay in the cache, and sentences of like length need little padding."""


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
    queue: Queue | None = None
    """The shared folder that the work came from; :func:`eckart.save` lets one of its workers write."""

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
    bits: Sequence[int] | None = None,
    rank_multiple: int = 1,
    min_rank: int = 1,
    probe_rounds: int | None = None,
    refit_blend: float | None = None,
    part: str = "calibration",
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    gradients: Gradients | None = None,
    probes: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    inplace: bool = False,
    certify: bool = True,
    queue: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Compress a model under a budget or a plan.

    Statistics come from ``data`` (see :func:`eckart.calibrate`) or from ``moments``; ranks from ``plan`` or from
    ``method`` and a budget (see :func:`eckart.plan`). A module in memory is left as it is, and a copy
    is compressed, unless ``inplace``. ``certify`` also fits every map on one half of the calibration and measures
    it on the other.

    ``forms`` says what maps may become: ``lowrank`` and ``pivoted`` factors, or, under one global budget, ``narrow``
    MLPs and attentions; under one in bytes, with moments and gradients, also ``sparse`` maps: some weights of every
    row stay, refitted, and zeros are not stored (:mod:`eckart.apply.sparse`), which saves bytes and no time. ``bits``
    (8, 4, 2) lets numbers be stored in so many bits; by default a budget in bytes
    chooses among 8, 4 and as they are, other budgets leave them as they are. ``probe_rounds`` (default 1 with data
    and a global budget, else 0) measure on some of the data what was predicted and correct the plan.
    ``gradients`` of the calibration are by default what the method (or the plan's methods) needs: ``full`` or ``none``.

    ``refit_blend`` (β in [0, 0.25]; default: no refit) fits the last factor of every compressed map again, block by
    block, on ``data`` as the compressed model sees them (:mod:`eckart.apply.refit`). It needs the dense original
    beside, so twice the memory; predicted and held-out errors remain those from before.

    Several processes can share the work; each gets the whole result. Under ``torchrun`` they share the calibration
    and the decompositions: call this, and :func:`eckart.save`, in every process; one that waits for another in vain
    gives up after ``ECKART_TIMEOUT`` seconds (3600). With ``queue``, a folder that all see,
    workers on any machines come and go (see ``eckart.apply.queue.Queue``); that needs moments from a file,
    or a method that needs none.

    Raises InputError with everything that is wrong before any long work, NotFiniteError, BudgetError.
    """
    start = time.perf_counter()
    if data is not None and moments is not None:
        raise InputError("data and moments exclude each other: moments are what calibrating on data gave.")
    if plan is not None and (
        method is not None or options or keep is not None or budget is not None or allocation is not None
    ):
        raise InputError("a plan decides methods, options, ranks and allocation; leave those out beside plan=.")
    if queue is not None and data is not None:
        raise InputError("queue shares decompositions, not a calibration: calibrate first, and give moments.")
    if refit_blend is not None:
        check_blend(refit_blend)
        if data is None:
            raise InputError("refit_blend runs both models on data; moments are not enough. Give data.")
    _, processes = join()
    if processes > 1 and queue is not None:
        raise InputError("torchrun and queue are two ways to share the work; take one of them.")
    wanted = None if plan is not None else budget_from(keep, budget)
    given = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    chosen = any_method(method or DEFAULT_METHOD)
    chosen_options = options_for(chosen, options or {})
    known = as_moments(moments)
    width = bits_from(bits, wanted, chosen, allocation)
    rounds = rounds_from(probe_rounds, data is not None, wanted, chosen, allocation)

    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    if not isinstance(model, (str, os.PathLike)) and not inplace:
        loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    base_print = fingerprint(loaded.model)
    if given is not None:
        given.check_model(base_print)
    if known is not None:
        known.check(base_print)
    sites = _sites_of(loaded, given, include, exclude, embeddings, head)
    if wanted is not None:
        check_allocation(chosen, allocation, wanted, width, forms)
    if wanted is not None and wanted.loss is None:
        check_budget(
            loaded.model,
            sites,
            wanted,
            method=chosen,
            options=chosen_options,
            allocation=allocation,
            forms=forms,
            bits=width,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
        )
    check_finite(loaded.model, sites)
    if data is not None:
        needs = _needs([chosen.name] if given is None else [step.method for step in given.steps])
        known = calibrate_sites(
            loaded,
            sites,
            data,
            part=part,
            field=field,
            samples=samples,
            length=length,
            batch_size=batch_size,
            gradients=gradients or ("full" if needs & {"gradient", "gradient_scale", "fisher"} else "none"),
            probes=probes,
            seed=seed,
            fisher="fisher" in needs,
            progress=progress,
        )
    crew = None
    if queue is not None:
        about = {
            "eckart": importlib.metadata.version("eckart"),
            "model": base_print,
            "dtype": str(next(loaded.model.parameters()).dtype),
            "moments": None if known is None else known.digest(),
            "method": chosen.name,
            "options": dataclasses.asdict(chosen_options),
            "sites": [site.name for site in sites],
            "budget": str(wanted),
            "choices": [allocation, list(forms), list(width), rank_multiple, min_rank, rounds],
        }
        crew = Queue(queue, about)
    decision = None
    if given is None and wanted is not None:
        distance = None
        if rounds and data is not None:
            distance = _distance(loaded, data, part, field, length, seed)
        decision = decide(
            loaded.model,
            sites,
            known,
            method=chosen,
            options=chosen_options,
            budget=wanted,
            allocation=allocation,
            forms=forms,
            bits=width,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            fingerprint=base_print,
            base=loaded.name,
            distance=distance,
            rounds=rounds,
            crew=crew,
            progress=progress,
        )
        given = decision.plan
    if given is None:
        raise InputError("neither a plan nor a budget was given.")
    if (together := crew_of(crew)) is not None:
        given = together.settle(given)
    original = copy.deepcopy(loaded.model) if refit_blend is not None else None
    outcome = apply_plan(
        loaded.model,
        given,
        sites,
        known,
        prepared=None if decision is None else decision.prepared,
        units=None if decision is None else decision.units,
        certify=certify,
        crew=crew,
        progress=progress,
    )
    if decision is not None:
        predicted = outcome.predicted_loss if decision.probed is None else decision.probed
        outcome = dataclasses.replace(outcome, method=chosen.name, predicted_loss=predicted)
    if original is not None and data is not None and refit_blend is not None:
        batches, _ = as_batches(
            loaded, data, part=part, field=field, samples=samples, length=length, batch_size=batch_size, seed=seed
        )
        refitted = refit(loaded.model, original, batches, sites, blend=refit_blend, progress=progress)
        note = f"{len(refitted)} maps were refitted (β = {refit_blend:g}); their errors are those from before."
        outcome = dataclasses.replace(outcome, notes=(*outcome.notes, note))
    return Compressed(
        loaded=dataclasses.replace(loaded, path=None),
        plan=given,
        outcome=dataclasses.replace(outcome, seconds=time.perf_counter() - start),
        base_fingerprint=base_print,
        curves={} if decision is None else curves_of(decision.prepared),
        calibration={} if known is None else known.meta,
        queue=crew,
    )


def _needs(names: Sequence[str]) -> frozenset[Need]:
    """The moments that some methods use; a name that a plan has wrong is found later, with all else that is."""
    known: Mapping[str, CompressMethod | ModuleMethod] = {**METHODS, **MODULES}
    return frozenset().union(*(known[name].needs for name in names if name in known))


def _distance(
    loaded: LoadedModel,
    data: DataLike,
    part: str,
    field: str | None,
    length: int | None,
    seed: int,
) -> Callable[[], float]:
    """The measure of the probes, on a few rows of the calibration data."""
    batches, _ = as_batches(
        loaded,
        data,
        part=part,
        field=field,
        samples=PROBE_SAMPLES[loaded.task],
        length=length,
        batch_size=PROBE_ROWS,
        seed=seed,
    )
    return distance_from_now(loaded, batches[: PROBE_SAMPLES[loaded.task]], seed=seed)


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
