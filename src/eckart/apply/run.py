"""A plan, carried out on a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from eckart.apply.error import relative_error
from eckart.apply.prepare import PreparedSite, prepare_site, site_moments
from eckart.arch import get_module, model_size, set_module, site_module, site_size
from eckart.compression import CompressMethod, get_method, options_for
from eckart.errors import InputError, problems
from eckart.forms import Form
from eckart.layers import layer_from_forms, tie_to, unsupported
from eckart.moments import Moments
from eckart.planning import Plan, Step, check
from eckart.records import LayerOutcome, Outcome, Progress, Site, Size, silent


def form_size(forms: Sequence[Form], site: Site) -> Size:
    """What the forms of a site cost, biases left out of all three figures, indices counted in bytes."""
    biases = sum(form.bias.nbytes for form in forms if form.bias is not None)
    numbers = sum(form.numel for form in forms)
    macs = numbers * (1 + len(site.tied))
    if site.kind == "embedding":
        expanded = sum(form.numel - form.rank * site.in_features for form in forms)
        macs = expanded + (numbers if site.tied else 0)
    return Size(
        parameters=numbers,
        bytes=sum(form.nbytes for form in forms) - biases,
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
    model: nn.Module,
    site: Site,
    moments: Moments,
    method: CompressMethod,
    options: Any,
    rank: int,
    centred: bool,
) -> float | None:
    """Relative error on half B of the map that half A alone would have given, averaged over the slices."""
    try:
        part = prepare_site(model, site, moments, method, options, half="A")
    except InputError:
        return None
    found = []
    for index, prepared in enumerate(part.slices):
        known = site_moments(moments, site, index, "B")
        if known is None or known.count == 0:
            continue
        approximation = prepared.left[:, :rank] @ prepared.right[:rank]
        found.append(relative_error(prepared.weight, approximation, known, centred=centred))
    return sum(found) / len(found) if found else None


def apply_plan(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    moments: Moments | None,
    *,
    prepared: Mapping[str, PreparedSite] | None = None,
    certify: bool = True,
    progress: Progress = silent,
) -> Outcome:
    """Replace the planned maps of ``model`` in place, one after the other.

    ``prepared`` holds decompositions that planning has made already; sites without one are decomposed here.
    With ``certify`` and moments, each map is fitted again on half A of the calibration and measured on half B.
    Raises InputError, with everything that is wrong, before the model is touched.
    """
    start = time.perf_counter()
    check(plan, sites)
    by_name = {site.name: site for site in sites}
    steps = {step.site: step for step in plan.steps}
    _refuse_unsupported(model, plan.steps, by_name)
    model_before = model_size(model)
    layers: list[LayerOutcome] = []
    for done, site in enumerate(sites):
        progress("compress", done, len(sites))
        step = steps.get(site.name)
        element = site_module(model, site)
        size = site_size(site, next(element.parameters()).element_size())
        if step is None or step.form == "dense":
            layers.append(
                LayerOutcome(site=site, form="dense", rank=site.full_rank, before=size, after=size, predicted=0.0)
            )
            continue
        method = get_method(step.method)
        options = options_for(method, step.options)
        part = (prepared or {}).get(site.name)
        if part is None:
            part = prepare_site(model, site, moments, method, options)
        forms = [method.cut(one, step.rank, step.form) for one in part.slices]
        centred = any(one.mean is not None for one in part.slices)
        held_out = None
        if moments is not None:
            known = [site_moments(moments, site, i) for i in range(site.slices)]
            errors = [
                relative_error(one.weight, form.dense(), each, centred=centred)
                for one, form, each in zip(part.slices, forms, known, strict=True)
                if each is not None
            ]
            predicted = sum(errors) / len(errors)
            if certify:
                held_out = held_out_error(model, site, moments, method, options, step.rank, centred)
        else:
            total = float(part.errors[0])
            predicted = float(part.errors[step.rank]) / total if total > 0 else 0.0
        loss = float(part.errors[step.rank]) if method.loss_units else None
        layers.append(
            LayerOutcome(
                site=site,
                form=step.form,
                rank=step.rank,
                before=size,
                after=form_size(forms, site),
                predicted=predicted,
                held_out=held_out,
                loss=loss,
            )
        )
        with torch.no_grad():
            _replace(model, site, forms)
    progress("compress", len(sites), len(sites))
    nothing = Size(parameters=0, bytes=0, macs=0)
    losses = [layer.loss for layer in layers if layer.loss is not None]
    compressed = [layer for layer in layers if layer.form != "dense"]
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
