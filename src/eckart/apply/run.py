"""A plan, carried out on a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.apply.bits import dense_of, metric_of, quantise_site
from eckart.apply.crew import Crew, Job, crew_of, do_all
from eckart.apply.error import relative_error
from eckart.apply.prepare import PreparedSite, job_of, prepare_site, prepare_tasks, site_moments
from eckart.apply.sparse import held_out_sparse, make_sparse
from eckart.apply.units import held_out_unit, prepare_units, unit_error, units_of
from eckart.arch import get_module, model_size, set_module, site_matrices, site_module, site_size
from eckart.compression import CompressMethod, get_method, kfac, options_for
from eckart.errors import InputError, problems
from eckart.forms import Form, Pivoted
from eckart.layers import layer_from_forms, tie_to, unsupported
from eckart.modules import (
    KNOWN_KINDS,
    NarrowSite,
    Piece,
    PreparedUnit,
    UnitFacts,
    get_module_method,
    narrow_sites,
    replace_narrow,
)
from eckart.moments import Moments
from eckart.planning import Plan, Step, check
from eckart.planning.curve import INDEX_BYTES
from eckart.records import LayerOutcome, Outcome, Progress, Site, Size, silent


def form_size(forms: Sequence[Form], site: Site) -> Size:
    """What the forms of a site cost, biases left out of all three figures, indices in bytes, as layers store them."""
    biases = sum(form.bias.nbytes for form in forms if form.bias is not None)
    wider = sum(form.index.nbytes - INDEX_BYTES * form.index.numel() for form in forms if isinstance(form, Pivoted))
    numbers = sum(form.numel for form in forms)
    macs = numbers * (1 + len(site.tied))
    if site.kind == "embedding":
        expanded = sum(form.numel - form.rank * site.in_features for form in forms)
        macs = expanded + (numbers if site.tied else 0)
    return Size(
        parameters=numbers,
        bytes=sum(form.nbytes for form in forms) - biases - wider,
        macs=macs,
    )


def _refuse_unsupported(model: nn.Module, steps: Sequence[Step], sites: Mapping[str, Site]) -> None:
    wrong = []
    for step in steps:
        if step.form != "dense":
            reason = unsupported(site_module(model, sites[step.site]))
            if reason is not None:
                wrong.append(f"{step.site}: {reason}")
    if wrong:
        raise InputError(problems("these sites have to stay dense; exclude them", wrong))


def _replace(model: nn.Module, site: Site, forms: Sequence[Form]) -> None:
    path = site.name.rpartition(".")[0] if site.kind == "experts" else site.name
    layer = layer_from_forms(site, get_module(model, path), forms)
    set_module(model, path, layer)
    for other in site.tied:
        set_module(model, other, tie_to(layer, site.name, get_module(model, other)))


def held_out_error(
    model: nn.Module, site: Site, moments: Moments, method: CompressMethod, options: Any, rank: int
) -> float | None:
    """Relative error on half B of the map that half A alone would have given, averaged over the slices."""
    try:
        part = prepare_site(model, site, moments, method, options, half="A")
    except InputError:
        return None
    centred = any(one.mean is not None for one in part.slices)
    found = []
    for index, prepared in enumerate(part.slices):
        known = site_moments(moments, site, index, "B")
        if known is None or known.count == 0:
            continue
        approximation = prepared.left[:, :rank] @ prepared.right[:rank]
        found.append(relative_error(prepared.weight, approximation, known, centred=centred))
    return sum(found) / len(found) if found else None


def held_out_errors(
    model: nn.Module,
    todo: Sequence[tuple[Site, Step]],
    moments: Moments,
    *,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> dict[str, float | None]:
    """:func:`held_out_error` of every planned site. With a ``crew``, and under ``torchrun``, the work is shared."""

    def error(index: int) -> float | None:
        site, step = todo[index]
        if step.form == "sparse":
            return _held_out_sparse(model, site, step, moments)
        method = get_method(step.method)
        return held_out_error(model, site, moments, method, options_for(method, step.options), step.rank)

    jobs = [job_of(site, f"{step.method} {step.rank} {dict(step.options)}") for site, step in todo]
    found = do_all(crew_of(crew), "certify", jobs, error, progress=progress)
    return {site.name: one for (site, _), one in zip(todo, found, strict=True)}


def _held_out_sparse(model: nn.Module, site: Site, step: Step, moments: Moments) -> float | None:
    try:
        half_a, half_b = moments.site(site.name, half="A"), moments.site(site.name, half="B")
        return held_out_sparse(site_matrices(model, site)[0], half_a, half_b, step)
    except InputError:  # one of the halves is empty
        return None


def _refuse_blind_zeros(steps: Sequence[Step], moments: Moments | None) -> None:
    """Zeros are chosen and fitted by second moments and gradients."""
    known = {} if moments is None else moments.input_of
    wrong = [
        f"{step.site}: the form sparse needs moments of it with gradients"
        for step in steps
        if step.form == "sparse"
        and (moments is None or step.site not in known or moments.site(step.site).gradient_scale is None)
    ]
    if wrong:
        raise InputError(problems("the plan needs other moments", wrong))


def apply_plan(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    moments: Moments | None,
    *,
    prepared: Mapping[str, PreparedSite] | None = None,
    units: Mapping[str, PreparedUnit] | None = None,
    certify: bool = True,
    crew: Crew | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Replace the planned maps of ``model`` in place, one after the other.

    ``prepared`` and ``units`` hold what planning has computed already; what they lack is computed here.
    With ``certify`` and moments, each map is fitted again on half A of the calibration and measured on half B.
    With a ``crew``, and under ``torchrun``, the processes share the decompositions.
    Raises InputError, with everything that is wrong, before the model is touched.
    """
    start = time.perf_counter()
    facts = {each.unit.name: each for each in units_of(model, sites, KNOWN_KINDS)} if _narrow_steps(plan) else {}
    check(plan, sites, [each.unit for each in facts.values()])
    by_name = {site.name: site for site in sites}
    steps = {step.site: step for step in plan.steps}
    _refuse_unsupported(model, [step for step in plan.steps if step.form != "narrow"], by_name)
    _refuse_blind_zeros(plan.steps, moments)
    model_before = model_size(model)
    planned = [
        (site, steps[site.name])
        for site in sites
        if site.name in steps and steps[site.name].form not in ("dense", "narrow")
    ]
    certified: Mapping[str, float | None] = {}
    if certify and moments is not None:
        certified = held_out_errors(model, planned, moments, crew=crew, progress=progress)
    if crew_of(crew) is not None:
        tasks = []
        for site, one in planned:
            if site.name not in (prepared or {}) and one.form != "sparse":
                method = get_method(one.method)
                tasks.append((site, method, options_for(method, one.options)))
        shared = prepare_tasks(model, tasks, moments, crew=crew, progress=progress)
        prepared = {**(prepared or {}), **{part.site.name: part for part in shared}}
    narrow = _narrowed(model, plan, sites, facts, moments, units or {}, certify, crew)
    layers: list[LayerOutcome] = []
    for done, site in enumerate(sites):
        progress("compress", done, len(sites))
        step = steps.get(site.name)
        size = site_size(site, next(site_module(model, site).parameters()).element_size())
        if site.name in narrow:
            one_site = narrow[site.name]
            known = None if moments is None else moments.site(site.name)
            second = one_site.second if one_site.second is not None else None if known is None else known.second
            with torch.no_grad():
                replace_narrow(model, site, one_site.narrow)
                if one_site.step.bits:
                    quantise_site(model, site.name, one_site.step, second)
            layers.append(replace(one_site.outcome, before=size, after=layer_size(site_module(model, site))))
            continue
        if step is None or (step.form == "dense" and not step.bits):
            layers.append(
                LayerOutcome(site=site, form="dense", rank=site.full_rank, before=size, after=size, predicted=0.0)
            )
            continue
        layers.append(_compressed(model, site, step, moments, prepared or {}, certified.get(site.name), size))
    progress("compress", len(sites), len(sites))
    nothing = Size(parameters=0, bytes=0, macs=0)
    losses = [layer.loss for layer in layers if layer.loss is not None]
    compressed = [layer for layer in layers if layer.form != "dense" or layer.bits]
    return Outcome(
        layers=tuple(layers),
        sites_before=sum((layer.before for layer in layers), nothing),
        sites_after=sum((layer.after for layer in layers), nothing),
        model_before=model_before,
        model_after=model_size(model),
        predicted_loss=sum(losses) if losses and len(losses) == len(compressed) else None,
        method=plan.method,
        budget=str(plan.budget) if plan.budget is not None else "edited plan",
        seconds=time.perf_counter() - start,
    )


def _compressed(
    model: nn.Module,
    site: Site,
    step: Step,
    moments: Moments | None,
    prepared: Mapping[str, PreparedSite],
    held_out: float | None,
    size: Size,
) -> LayerOutcome:
    """One map, replaced by what its step says."""
    method = get_method(step.method)
    options = options_for(method, step.options)
    known = [None if moments is None else site_moments(moments, site, i) for i in range(site.slices)]
    weights = site_matrices(model, site)[0]
    metric = None
    if (step.bits or step.form == "sparse") and known[0] is not None and method.loss_units:
        metric = metric_of(weights, known[0], kfac.Options())
    predicted, loss = 0.0, 0.0 if method.loss_units else None
    rank = step.rank
    if step.form == "dense":
        rank = site.full_rank
        second = None if known[0] is None else known[0].second
        exact = weights["weight"].to("cpu", torch.float64).clone()
        with torch.no_grad():
            quantise_site(model, site.name, step, second, metric)
        lost = exact - dense_of(site_module(model, site)).to("cpu", torch.float64)
        if metric is not None:
            loss = metric.loss(lost)
        if known[0] is not None:
            predicted = relative_error(exact, exact - lost, known[0], centred=False)
        after = layer_size(site_module(model, site))
    elif step.form == "sparse":
        if known[0] is None or metric is None:
            raise InputError(f"{site.name}: the form sparse needs moments with gradients, and a method that uses them.")
        exact = weights["weight"].to("cpu", torch.float64).clone()
        with torch.no_grad():
            make_sparse(model, site, step, weights, known[0])
        stored = dense_of(site_module(model, site)).to("cpu", torch.float64)
        loss = metric.loss(exact - stored)
        predicted = relative_error(exact, stored, known[0], centred="bias" in weights)
        after = layer_size(site_module(model, site))
    else:
        part = prepared.get(site.name)
        if part is None:
            part = prepare_site(model, site, moments, method, options)
        forms = [method.cut(one, step.rank, _factor_form(step)) for one in part.slices]
        centred = any(one.mean is not None for one in part.slices)
        stand_ins = [form.dense() for form in forms]
        with torch.no_grad():
            _replace(model, site, forms)
            if step.bits:
                second = None if known[0] is None else known[0].second
                quantise_site(model, site.name, step, second)
                stand_ins = [dense_of(site_module(model, site))]
        linear = site.kind in ("linear", "conv1d") and not site.tied
        after = layer_size(site_module(model, site)) if linear else form_size(forms, site)
        if moments is not None:
            errors = [
                relative_error(one.weight, dense, each, centred=centred)
                for one, dense, each in zip(part.slices, stand_ins, known, strict=True)
                if each is not None
            ]
            predicted = sum(errors) / len(errors)
        else:
            total = float(part.errors[0])
            predicted = float(part.errors[step.rank]) / total if total > 0 else 0.0
        if method.loss_units:
            loss = float(part.errors[step.rank])
            if metric is not None:
                loss = metric.loss(
                    part.slices[0].weight.to("cpu", torch.float64) - stand_ins[0].to("cpu", torch.float64)
                )
    return LayerOutcome(
        site=site,
        form=step.form,
        rank=rank,
        before=size,
        after=after,
        predicted=predicted,
        held_out=held_out,
        loss=loss,
        bits=step.bits,
        repair=step.repair,
    )


def _factor_form(step: Step) -> Literal["lowrank", "pivoted"]:
    return "pivoted" if step.form == "pivoted" else "lowrank"


def layer_size(layer: nn.Module) -> Size:
    """What a layer costs, biases left out."""
    whole = model_size(layer)
    biases = [p for name, p in layer.named_parameters() if name.rpartition(".")[2] == "bias"]
    return Size(
        parameters=whole.parameters - sum(p.numel() for p in biases),
        bytes=whole.bytes - sum(p.nbytes for p in biases),
        macs=whole.macs,
    )


@dataclass(frozen=True, eq=False)
class _NarrowSite:
    """What becomes of one map of a unit."""

    narrow: NarrowSite
    step: Step
    second: Tensor | None
    outcome: LayerOutcome


def _narrow_steps(plan: Plan) -> list[Step]:
    return [step for step in plan.steps if step.form == "narrow"]


def _narrowed(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    facts: Mapping[str, UnitFacts],
    moments: Moments | None,
    known: Mapping[str, PreparedUnit],
    certify: bool,
    crew: Crew | None,
) -> dict[str, _NarrowSite]:
    """Every map that a unit changes, before any is changed."""
    by_name = {site.name: site for site in sites}
    pieces: list[Piece] = []
    owner: dict[str, Step] = {}
    outcomes: dict[str, LayerOutcome] = {}
    nothing = Size(parameters=0, bytes=0, macs=0)
    narrow = _narrow_steps(plan)

    def error(index: int) -> float | None:
        step, method = narrow[index], get_module_method(narrow[index].method)
        options = options_for(method, step.options)
        if moments is None or not certify:
            return None
        return held_out_unit(model, sites, facts[step.site], step.rank, moments, method, options)

    jobs = [Job(f"{step.site} {step.method} {step.rank} {dict(step.options)}") for step in narrow]
    certified = do_all(crew_of(crew), "certify narrow", jobs, error)
    for step, held_out in zip(narrow, certified, strict=True):
        unit, method = facts[step.site], get_module_method(step.method)
        options = options_for(method, step.options)
        part = known.get(step.site)
        if part is None:
            part = prepare_units(model, [unit], sites, moments, method, options)[step.site]
        cut = part.cut(step.rank)
        pieces += cut
        predicted = 0.0 if moments is None else unit_error(model, by_name, part, step.rank, moments, None)
        carrier = part.stand_in(step.rank)[0]
        for name in unit.unit.sites:
            owner[name] = step
            share = step.rank / unit.unit.full_rank
            loss = 0.0 if method.loss_units else None
            if name == carrier and method.loss_units:
                loss = float(part.errors[step.rank])
            if name in outcomes and loss is not None:  # a fused map that two units change
                loss += outcomes[name].loss or 0.0
            outcomes[name] = LayerOutcome(
                site=by_name[name],
                form="narrow",
                rank=round(share * by_name[name].full_rank),
                before=nothing,
                after=nothing,
                predicted=predicted,
                held_out=held_out,
                loss=loss,
                bits=step.bits,
            )
    seconds = {piece.site: piece.second for piece in pieces if piece.second is not None}
    return {
        name: _NarrowSite(narrow, owner[name], seconds.get(name), outcomes[name])
        for name, narrow in narrow_sites(model, by_name, pieces).items()
    }
