"""A streamed compression, from the first unit of work to the last weight file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.apply.run import form_size, layer_size
from eckart.arch import model_size, site_module, site_size
from eckart.forms import Form, LowRank, Pivoted
from eckart.hf.mapped import sources
from eckart.layers import describe
from eckart.modules import ModuleMethod, Piece
from eckart.moments.tokens import BatchTokens
from eckart.planning import Choice, Curve, Plan, Step
from eckart.records import LayerOutcome, Outcome, Progress, Site, Size, silent
from eckart.streaming.factors import SiteCurves, give_back_memory, layer_from_files, read_curves
from eckart.streaming.journal import Journal, Lost
from eckart.streaming.narrow import UnitFigures, read_figures, read_pieces
from eckart.streaming.passes import Measure, block_unit, factor_file, factor_files, second_file, units, units_of
from eckart.streaming.plan import Chosen, narrow_plan, number_bytes, plan_from, site_choices
from eckart.streaming.shards import Shard, entries_of, lay_out, narrow_layers, write_index, write_shard

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


@dataclass(frozen=True)
class _Decision:
    """A plan, and what it was made from."""

    plan: Plan
    entries: dict[str, dict[str, Any]]
    """Of config.json."""
    curves: Mapping[str, SiteCurves]
    choices: Mapping[str, Choice]
    narrow: Mapping[str, UnitFigures]


def stream(
    measure: Measure,
    journal: Journal,
    skeleton: Callable[[dict[str, dict[str, Any]]], nn.Module],
    *,
    widths: Chosen | None = None,
    progress: Progress = silent,
) -> Streamed:
    """Do every unit of work that the journal lacks: calibrate and decompose, plan, cut and write.

    ``skeleton(entries)`` builds the compressed model without numbers; ``widths`` is what a method of narrower modules
    makes of every unit and site. A unit of work whose files turn out damaged is made again, with what hangs on it
    untouched, since every unit gives the same bytes each time.
    """
    (journal.folder / MODEL).mkdir(exist_ok=True)
    for cut_short in journal.folder.rglob(".*.part"):
        cut_short.unlink()
    while True:
        try:
            _carry_out(journal, units(measure, journal, progress))
            decision = _decide(measure, journal, widths)
            model = skeleton(decision.entries)
            shards = _shards(measure, model, decision)
            _carry_out(journal, _writing(measure, journal, decision, shards, progress))
            break
        except Lost as lost:
            journal.forget(lost.unit)
    write_index(journal.folder / MODEL, shards)
    return Streamed(
        folder=journal.folder / MODEL,
        plan=decision.plan,
        outcome=_outcome(measure, decision, model, _unseen(measure, journal)),
        curves={name: _relative(found) for name, found in decision.curves.items()},
        model=model,
        calibration=_calibration(measure, journal),
    )


def _unseen(measure: Measure, journal: Journal) -> tuple[str, ...]:
    """A sentence on the experts that no token reached."""
    lost = [
        (name, experts)
        for block in range(len(measure.route))
        if journal.has(block_unit(block))
        for name, experts in journal.facts(block_unit(block)).get("unseen", {}).items()
    ]
    if not lost:
        return ()
    name, experts = max(lost, key=lambda found: len(found[1]))
    return (
        f"no calibration token reached {sum(len(experts) for _, experts in lost)} expert matrices of {len(lost)} sites "
        f"(as {name}: {', '.join(map(str, experts[:8]))}{', …' if len(experts) > 8 else ''}); they were compressed by "
        "the mean of the other experts' inputs. Calibrate on more, or more varied, text.",
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


def _decide(measure: Measure, journal: Journal, widths: Chosen | None) -> _Decision:
    sites = {site.name: site for site in measure.sites}
    if isinstance(measure.method, ModuleMethod):
        assert widths is not None
        return _decide_narrow(measure, measure.method, journal, widths, sites)
    found: dict[str, SiteCurves] = {}
    curves = []
    for name, (block, index) in _places(measure).items():
        journal.require(block_unit(block))
        known = read_curves([journal.folder / file for file in factor_files(block, index, sites[name])])
        choices = known.choices
        if choices is None:
            choices = site_choices(measure.model, sites[name], known.errors.numpy(), measure.wanted)
        found[name] = known
        curves.append(Curve(site=sites[name], choices=choices))
    plan, chosen = plan_from(
        measure.model, curves, measure.wanted, measure.method, measure.options, measure.fingerprint
    )
    return _Decision(plan, entries_of(plan, sites), found, chosen, {})


def _decide_narrow(
    measure: Measure, method: ModuleMethod, journal: Journal, widths: Chosen, sites: Mapping[str, Site]
) -> _Decision:
    figures: dict[str, UnitFigures] = {}
    entries: dict[str, dict[str, Any]] = {}
    for block in range(len(measure.route)):
        if not measure.units_inside(block):
            continue
        journal.require(block_unit(block))
        for index, each in enumerate(measure.units_inside(block)):
            figures[each.unit.name] = read_figures(journal.folder / factor_file(block, index), each)
        pieces = _pieces(measure, journal, block)
        holder = nn.Module()
        names = dict.fromkeys(piece.site for piece in pieces)
        for name in names:  # one after the other: only their shapes are of interest
            holder.add_module("site", narrow_layers(measure.model, sites, pieces, [name])[name])
            entries[name] = describe(holder)["site"]
    losses = {name: one.loss for name, one in figures.items()}
    plan = narrow_plan(
        measure.model,
        measure.sites,
        widths,
        losses,
        measure.wanted,
        method,
        measure.options,
        measure.fingerprint,
    )
    return _Decision(plan, entries, {}, {}, figures)


def _pieces(measure: Measure, journal: Journal, block: int) -> list[Piece]:
    """What the units of a block became."""
    return [
        piece
        for index, each in enumerate(measure.units_inside(block))
        for piece in read_pieces(journal.folder / factor_file(block, index), each)
    ]


def _shards(measure: Measure, model: nn.Module, decision: _Decision) -> list[Shard]:
    blocks = [block.name for block in measure.route.blocks]
    changed = {step.site for step in decision.plan.steps if step.form != "dense" or step.bits} | set(decision.entries)
    sites = {site.name: site for site in measure.sites if site.name in changed}
    return lay_out(model, blocks, sites, measure.wanted.most, sources(measure.model))


def _writing(
    measure: Measure, journal: Journal, decision: _Decision, shards: Sequence[Shard], progress: Progress
) -> Iterator[tuple[str, Callable[[], None]]]:
    places = _places(measure)
    sites = {site.name: site for site in measure.sites}
    steps = {step.site: step for step in decision.plan.steps}

    def layer(site: Site, original: nn.Module) -> nn.Module:
        block, index = places[site.name]
        if isinstance(measure.method, ModuleMethod):
            return narrow_layers(measure.model, sites, _pieces(measure, journal, block), [site.name])[site.name]
        files = [journal.folder / file for file in factor_files(block, index, site)]
        seconds = {i: journal.folder / second_file(block, i) for i in range(len(measure.inside(block)))}
        return layer_from_files(files, seconds, measure.model, site, steps[site.name], original)

    def make(shard: Shard) -> None:
        inside = dict.fromkeys(places[site.name][0] for site in shard.sites)
        with contextlib.ExitStack() as stack:
            for block in inside:
                journal.require(block_unit(block))
                stack.enter_context(measure.route.holding(block))
            mark, seconds = write_shard(journal.folder / MODEL, shard, measure.model, layer)
        journal.seconds += seconds
        journal.done(shard.name, {f"{MODEL}/{shard.name}": mark})
        give_back_memory()

    for done, shard in enumerate(shards):
        progress("write", done, len(shards))
        yield shard.name, lambda shard=shard: make(shard)  # type: ignore[misc]
    progress("write", len(shards), len(shards))
    for shard in shards:
        journal.require(shard.name)


def _outcome(measure: Measure, decision: _Decision, model: nn.Module, notes: tuple[str, ...]) -> Outcome:
    steps = {step.site: step for step in decision.plan.steps}
    narrow = _narrow_outcomes(measure, decision, model)
    layers = []
    for site in measure.sites:
        before = site_size(site, number_bytes(measure.model, site))
        if site.name in narrow:
            layers.append(dataclasses.replace(narrow[site.name], before=before))
            continue
        step = steps[site.name]
        if step.form == "dense" and not step.bits:
            layers.append(
                LayerOutcome(site=site, form="dense", rank=site.full_rank, before=before, after=before, predicted=0.0)
            )
            continue
        layers.append(_changed(measure, decision, model, site, step, before))
    nothing = Size(parameters=0, bytes=0, macs=0)
    losses = [layer.loss for layer in layers if layer.loss is not None]
    compressed = [layer for layer in layers if layer.form != "dense" or layer.bits]
    return Outcome(
        layers=tuple(layers),
        sites_before=sum((layer.before for layer in layers), nothing),
        sites_after=sum((layer.after for layer in layers), nothing),
        model_before=model_size(measure.model),
        model_after=model_size(model),
        predicted_loss=sum(losses) if losses and len(losses) == len(compressed) else None,
        method=measure.method.name,
        budget=str(decision.plan.budget),
        seconds=0.0,
        notes=notes,
    )


def _changed(
    measure: Measure, decision: _Decision, model: nn.Module, site: Site, step: Step, before: Size
) -> LayerOutcome:
    """One map in factors, in few bits, or both. What rounding adds is a share of the error at rank 0, as planned."""
    found = decision.curves[site.name]
    rank = site.full_rank if step.form == "dense" else step.rank
    exact, total = float(found.errors[rank]) if step.form != "dense" else 0.0, float(found.errors[0])
    loss = decision.choices[site.name].loss if step.bits else exact
    predicted = float(found.predicted[rank]) if step.form != "dense" else 0.0
    if step.bits and total > 0:
        predicted = min(predicted + max(loss - exact, 0.0) / total, 1.0)
    held_out = None if found.held_out is None or step.form == "dense" else float(found.held_out[rank])
    if step.bits:
        after = layer_size(model.get_submodule(site.name))
    else:
        dtype = next(site_module(measure.model, site).parameters()).dtype
        after = form_size([_shape_of(step, site, dtype)] * site.slices, site)
    return LayerOutcome(
        site=site,
        form=step.form,
        rank=rank,
        before=before,
        after=after,
        predicted=predicted,
        held_out=held_out,
        loss=loss if measure.method.loss_units else None,
        bits=step.bits,
        repair=step.repair,
    )


def _narrow_outcomes(measure: Measure, decision: _Decision, model: nn.Module) -> dict[str, LayerOutcome]:
    """What happened to the maps of every unit; the loss of a unit is put down to its carrier."""
    sites = {site.name: site for site in measure.sites}
    nothing = Size(parameters=0, bytes=0, macs=0)
    found: dict[str, LayerOutcome] = {}
    for each in measure.narrow:
        one = decision.narrow.get(each.unit.name)
        if one is None:
            continue
        share = measure.widths[each.unit.name] / each.unit.full_rank
        for name in each.unit.sites:
            loss = None
            if measure.method.loss_units:
                before = found[name].loss if name in found else 0.0  # a fused map that two units change
                loss = (before or 0.0) + (one.loss if name == one.carrier else 0.0)
            found[name] = LayerOutcome(
                site=sites[name],
                form="narrow",
                rank=round(share * sites[name].full_rank),
                before=nothing,
                after=layer_size(model.get_submodule(name)),
                predicted=one.predicted,
                held_out=one.held_out,
                loss=loss,
            )
    return found


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
