"""What the report page shows, worked out of the records: rows, maps, cards. The template only places it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eckart.records import Evaluation, LayerOutcome, Outcome, Size
from eckart.report import charts
from eckart.report import format as fmt
from eckart.report.layout import group_of, stack_of
from eckart.report.palette import step
from eckart.report.verdict import METRICS, flagged, headline, kept, metric_of

FORM_WORDS = {
    "dense": "kept dense",
    "lowrank": "two factors",
    "pivoted": "pivoted",
    "narrow": "narrower",
    "sparse": "sparse",
}
MANY_PANELS = 24
"""With more kinds of layers than this, all curves share one drawing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer in the table."""

    index: int
    layer: LayerOutcome
    stack: str
    """Path of the list of blocks that holds it: ``encoder.layer``."""
    role: str
    depth: int | None
    group: str
    """The part of the model and the role: what the map has as a row."""
    name: str
    full_name: str
    shape: str
    form: str
    rank: str
    kept: float
    kept_text: str
    step: int
    predicted: str
    held_out: str
    flag: str
    """Empty, or how far the held-out error is from the predicted one."""
    loss: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One figure, before and after."""

    label: str
    value: str
    detail: str
    bar: float | None = None
    """Share left, drawn as a bar."""
    drawing: Markup | None = None
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The error curves of one kind of layer."""

    title: str
    drawing: Markup


def rows(outcome: Outcome) -> tuple[Row, ...]:
    """All layers in the order of the model; none is left out."""
    return tuple(_row(i, layer) for i, layer in enumerate(outcome.layers))


def panels(table: Sequence[Row], curves: Mapping[str, Sequence[float]]) -> tuple[Panel, ...]:
    """A drawing for each kind of layer that has curves."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        if len(curves.get(row.full_name, ())) > 1:
            groups.setdefault(row.group, []).append(row)
    if len(groups) > MANY_PANELS:
        groups = {"all layers": [row for members in groups.values() for row in members]}
    stacks = {row.stack for row in table}
    points = 32 if len(table) <= 256 else 20
    deepest = max((row.layer.site.depth or 0 for row in table), default=0)
    return tuple(
        _panel(
            title.removeprefix(f"{next(iter(stacks))} ") if len(stacks) == 1 else title,
            [
                charts.Line(
                    index=row.index,
                    errors=charts.thinned(curves[row.full_name], points),
                    chosen=_chosen(row),
                    place=(row.layer.site.depth or 0) / max(1, deepest),
                )
                for row in members
            ],
        )
        for title, members in groups.items()
    )


def size_cards(before: Size, after: Size) -> tuple[Card, ...]:
    """Parameters, bytes and multiply-adds before and after."""
    return (
        _size("Parameters", before.parameters, after.parameters, fmt.count),
        _size("Bytes of weights", before.bytes, after.bytes, fmt.human_bytes),
        _size("Multiply-adds per token", before.macs, after.macs, fmt.count),
    )


def disk_card(evaluation: Evaluation) -> Card | None:
    """The weight files on disk, where both sizes are known."""
    sizes = evaluation.disk_bytes
    if "model" not in sizes or "base" not in sizes:
        return None
    return _size("Weight files on disk", sizes["base"], sizes["model"], fmt.human_bytes)


def quality_cards(evaluation: Evaluation) -> tuple[Card, ...]:
    """A card per metric; the original's own value is a detail of its partner."""
    cards = []
    first = headline(evaluation)
    for name, value in sorted(evaluation.metrics.items(), key=lambda item: first is None or item[0] != first[0]):
        if name.endswith("_base") and name.removesuffix("_base") in evaluation.metrics:
            continue
        metric = metric_of(name)
        base = evaluation.metrics.get(f"{name}_base")
        detail = f"95{fmt.SPACE}% interval {fmt.interval(value)}, n{fmt.SPACE}={fmt.SPACE}{fmt.count(value.n)}"
        if base is not None:
            detail = f"the original has {fmt.mean(base)}; {detail}"
        if value.unit:
            detail = f"{value.unit}; {detail}"
        cards.append(
            Card(
                label=metric.label,
                value=fmt.mean(value),
                detail=detail,
                drawing=None if metric.same is None else charts.whisker(value, metric.same),
                meaning=metric.meaning,
            )
        )
    return tuple(cards)


def speed_cards(evaluation: Evaluation) -> tuple[Card, ...]:
    """A card per batch size that was timed."""
    return tuple(
        Card(
            label=f"Batch {run.batch} × {run.length} tokens",
            value=fmt.times(run.speedup),
            detail=f"{fmt.seconds(run.model)} instead of {fmt.seconds(run.base)} a pass, median",
            bar=min(1.0, run.model / run.base),
        )
        for run in evaluation.latency
    )


def glossary(evaluation: Evaluation | None) -> tuple[tuple[str, str], ...]:
    """The meaning of each metric on this page."""
    names = evaluation.metrics if evaluation else {}
    return tuple((METRICS[name].label, METRICS[name].meaning) for name in names if name in METRICS)


def _row(index: int, layer: LayerOutcome) -> Row:
    site, dense = layer.site, layer.form == "dense"
    untouched = dense and not layer.bits
    left = kept(layer)
    slices = f" × {site.slices}" if site.slices > 1 else ""
    stack = stack_of(site.name, site.depth, site.role)
    return Row(
        index=index,
        layer=layer,
        stack=stack,
        role=site.role,
        depth=site.depth,
        group=group_of(site.name, stack, site.depth, site.role),
        name=fmt.middle(site.name),
        full_name=site.name,
        shape=f"{site.out_features}{fmt.SPACE}×{fmt.SPACE}{site.in_features}{slices}",
        form=_form(layer),
        rank="full" if dense else f"{layer.rank} / {site.in_features if layer.form == 'sparse' else site.full_rank}",
        kept=left,
        kept_text=fmt.share(left),
        step=step(left),
        predicted=fmt.NONE if untouched else fmt.percent(layer.predicted),
        held_out=fmt.NONE if untouched else fmt.percent(layer.held_out),
        flag=_flag(layer),
        loss=fmt.NONE if untouched else fmt.figure(layer.loss, 2),
    )


def _form(layer: LayerOutcome) -> str:
    """The form in words, with the bits of its numbers."""
    words = (
        FORM_WORDS["dense"].removeprefix("kept ") if layer.form == "dense" and layer.bits else FORM_WORDS[layer.form]
    )
    bits = f", {layer.bits} bits" if layer.bits else ""
    return f"{words}{bits}" + (f" + rank {layer.repair}" if layer.repair else "")


def _flag(layer: LayerOutcome) -> str:
    if not flagged(layer) or layer.held_out is None:
        return ""
    if layer.predicted <= 0:
        return "held-out error where none was predicted"
    return f"{fmt.times(layer.held_out / layer.predicted)} the predicted error"


def _panel(title: str, lines: Sequence[charts.Line]) -> Panel:
    words = f"{title}: relative error against rank, {len(lines)} layer{'s' if len(lines) > 1 else ''}"
    return Panel(title=title, drawing=charts.curves(lines, words))


def _chosen(row: Row) -> tuple[float, float] | None:
    if row.layer.form in ("dense", "narrow", "sparse"):
        return None
    return row.layer.rank / max(1, row.layer.site.full_rank), row.layer.predicted


def _size(label: str, before: int, after: int, show: fmt.Show) -> Card:
    left = after / max(1, before)
    return Card(label=label, value=show(after), detail=f"{fmt.share(left)} of {show(before)}", bar=left)
