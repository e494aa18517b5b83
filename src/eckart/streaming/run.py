"""A streamed compression, from the first unit of work to the last weight file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.apply.run import form_size
from eckart.arch import model_size, site_size
from eckart.forms import Form, LowRank, Pivoted
from eckart.moments.tokens import BatchTokens
from eckart.planning import Plan, Step
from eckart.records import LayerOutcome, Outcome, Progress, Site, Size, silent
from eckart.streaming.factors import SiteCurves, give_back_memory, read_curves
from eckart.streaming.journal import Journal, Lost
from eckart.streaming.passes import Measure, block_unit, factor_file, units, units_of
from eckart.streaming.plan import Wanted, number_bytes, plan_from
from eckart.streaming.shards import Shard, entries_of, lay_out, write_index, write_shard

MODEL = "model"
"""Folder of the finished files inside of the work folder."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What a streamed compression made; the weight files lie in ``folder``."""

    folder: Path
    plan: Plan
    outcome: Outcome
    """``seconds`` is 0: files that say how long they took would differ between two runs."""
    curves: Mapping[str, list[float]]
    model: nn.Module
    """The compressed model without numbers; its config belongs into the folder."""
    calibration: Mapping[str, Any]
    """What the moments were collected on."""


def stream(
    measure: Measure,
    wanted: Wanted,
    journal: Journal,
    skeleton: Callable[[dict[str, dict[str, Any]]], nn.Module],
    *,
    progress: Progress = silent,
) -> Streamed:
    """Do every unit of work that the journal lacks: calibrate and decompose, plan, cut and write.

    ``skeleton(entries)`` builds the compressed model without numbers. A unit whose files turn out damaged is made
    again, with what hangs on it untouched, since every unit gives the same bytes each time.
    """
    (journal.folder / MODEL).mkdir(exist_ok=True)
    for cut_short in journal.folder.rglob(".*.part"):
        cut_short.unlink()
    while True:
        try:
            _carry_out(journal, units(measure, journal, progress))
            plan, curves = _decide(measure, wanted, journal)
            model = skeleton(entries_of(plan, {site.name: site for site in measure.sites}))
            shards = _shards(measure, wanted, model)
            _carry_out(journal, _writing(measure, journal, plan, shards, progress))
            break
        except Lost as lost:
            journal.forget(lost.unit)
    write_index(journal.folder / MODEL, shards)
    return Streamed(
        folder=journal.folder / MODEL,
        plan=plan,
        outcome=_outcome(measure, plan, curves, model),
        curves={name: _relative(found) for name, found in curves.items()},
        model=model,
        calibration=_calibration(measure, journal),
    )


def _calibration(measure: Measure, journal: Journal) -> dict[str, Any]:
    if not measure.batches:
        return {}
    rows = [BatchTokens.of(batch, 0) for batch in measure.batches]
    return {
        "gradients": measure.gradients,
        "loss": "none" if measure.loss is None else measure.loss.__qualname__,
        "probes": measure.probes if measure.backward else 0,
        "seed": measure.seed,
        "batches": len(rows),
        "torch": torch.__version__,
        "tokens": sum(one.tokens for one in rows),
        "units": units_of(measure, journal),
    }


def _carry_out(journal: Journal, work: Iterator[tuple[str, Callable[[], None]]]) -> None:
    for unit, make in work:
        if not journal.has(unit):
            make()


def _places(measure: Measure) -> dict[str, tuple[int, int]]:
    """Block and position in it of every site."""
    return {
        site.name: (block, index)
        for block in range(len(measure.route))
        for index, site in enumerate(measure.inside(block))
    }


def _decide(measure: Measure, wanted: Wanted, journal: Journal) -> tuple[Plan, dict[str, SiteCurves]]:
    curves = {}
    for name, (block, index) in _places(measure).items():
        journal.require(block_unit(block))
        curves[name] = read_curves(journal.folder / factor_file(block, index))
    errors = {name: found.errors.numpy() for name, found in curves.items()}
    plan = plan_from(measure.model, measure.sites, errors, wanted, measure.method, measure.options, measure.fingerprint)
    return plan, curves


def _shards(measure: Measure, wanted: Wanted, model: nn.Module) -> list[Shard]:
    blocks = [block.name for block in measure.route.blocks]
    return lay_out(model, blocks, {site.name: site for site in measure.sites}, wanted.most)


def _writing(
    measure: Measure, journal: Journal, plan: Plan, shards: Sequence[Shard], progress: Progress
) -> Iterator[tuple[str, Callable[[], None]]]:
    places = _places(measure)
    steps = {step.site: step for step in plan.steps}
    factors = {name: journal.folder / factor_file(*place) for name, place in places.items()}

    def make(shard: Shard) -> None:
        for site in shard.sites:
            journal.require(block_unit(places[site.name][0]))
        mark, seconds = write_shard(journal.folder / MODEL, shard, measure.model, steps, factors)
        journal.seconds += seconds
        journal.done(shard.name, {f"{MODEL}/{shard.name}": mark})
        give_back_memory()

    for done, shard in enumerate(shards):
        progress("write", done, len(shards))
        yield shard.name, lambda shard=shard: make(shard)  # type: ignore[misc]
    progress("write", len(shards), len(shards))
    for shard in shards:
        journal.require(shard.name)


def _outcome(measure: Measure, plan: Plan, curves: Mapping[str, SiteCurves], model: nn.Module) -> Outcome:
    steps = {step.site: step for step in plan.steps}
    layers = []
    for site in measure.sites:
        step, found = steps[site.name], curves[site.name]
        width = number_bytes(measure.model, site)
        before = site_size(site, width)
        if step.form == "dense":
            layers.append(
                LayerOutcome(site=site, form="dense", rank=site.full_rank, before=before, after=before, predicted=0.0)
            )
            continue
        weight = measure.model.get_submodule(site.name).get_parameter("weight")
        layers.append(
            LayerOutcome(
                site=site,
                form=step.form,
                rank=step.rank,
                before=before,
                after=form_size([_shape_of(step, site, weight.dtype)], site),
                predicted=float(found.predicted[step.rank]),
                held_out=None if found.held_out is None else float(found.held_out[step.rank]),
                loss=float(found.errors[step.rank]) if measure.method.loss_units else None,
            )
        )
    nothing = Size(parameters=0, bytes=0, macs=0)
    losses = [layer.loss for layer in layers if layer.loss is not None]
    compressed = [layer for layer in layers if layer.form != "dense"]
    return Outcome(
        layers=tuple(layers),
        sites_before=sum((layer.before for layer in layers), nothing),
        sites_after=sum((layer.after for layer in layers), nothing),
        model_before=model_size(measure.model),
        model_after=model_size(model),
        predicted_loss=sum(losses) if losses and len(losses) == len(compressed) else None,
        method=plan.method,
        budget=str(plan.budget),
        seconds=0.0,
    )


def _shape_of(step: Step, site: Site, dtype: torch.dtype) -> Form:
    """The form of a step, without numbers."""
    with torch.device("meta"):
        m, n, k = site.out_features, site.in_features, step.rank
        if step.form == "lowrank":
            return LowRank(a=torch.empty(k, n, dtype=dtype), b=torch.empty(m, k, dtype=dtype))
        index = torch.empty(m, dtype=torch.int32)  # as layers store it
        return Pivoted(a=torch.empty(k, n, dtype=dtype), b=torch.empty(m - k, k, dtype=dtype), index=index)


def _relative(curves: SiteCurves) -> list[float]:
    total = float(curves.errors[0])
    return (curves.errors / total).tolist() if total > 0 else [0.0] * len(curves.errors)
