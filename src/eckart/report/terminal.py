"""A run in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.records import Evaluation, Outcome
from eckart.report import format as fmt
from eckart.report import view
from eckart.report.verdict import budget_reached, flagged, metric_of


def render_terminal(outcome: Outcome, evaluation: Evaluation | None = None) -> RenderableType:
    """Sizes, quality, speed and notes of a run, ready for ``rich.console.Console.print``."""
    parts: list[RenderableType] = [_sizes(outcome, evaluation), Text(_summary(outcome))]
    if evaluation and evaluation.metrics:
        parts += [Text(), _quality(evaluation)]
    if evaluation and evaluation.latency:
        parts += [Text(), _speed(evaluation)]
    notes = (*outcome.notes, *(evaluation.warnings if evaluation else ()))
    if notes:
        parts += [Text(), *(Text(f"note: {note}", style="yellow") for note in notes)]
    return Group(*parts)


def render_layers(outcome: Outcome) -> RenderableType:
    """All layers with what was kept of them; a ``!`` marks held-out errors above twice the predicted ones."""
    table = plain_table("layer", "shape", "form", "rank", "kept", "error", "held out", "loss", words=3)
    for row in view.rows(outcome):
        held_out = f"{row.held_out} !" if row.flag else row.held_out
        cells = (row.name, row.shape, row.form, row.rank, row.kept_text, row.predicted, held_out, row.loss)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _sizes(outcome: Outcome, evaluation: Evaluation | None) -> Table:
    table = plain_table("", "before", "after", "kept")
    for heading, before, after in (
        ("sites", outcome.sites_before, outcome.sites_after),
        ("model", outcome.model_before, outcome.model_after),
    ):
        for label, show in (("parameters", fmt.count), ("bytes", fmt.human_bytes), ("macs", fmt.count)):
            old, new = getattr(before, label), getattr(after, label)
            words = "multiply-adds" if label == "macs" else label
            table.add_row(f"{heading}: {words}", show(old), show(new), fmt.share(new / max(1, old)))
    if evaluation and {"model", "base"} <= set(evaluation.disk_bytes):
        old, new = evaluation.disk_bytes["base"], evaluation.disk_bytes["model"]
        table.add_row("model: on disk", fmt.human_bytes(old), fmt.human_bytes(new), fmt.share(new / max(1, old)))
    return table


def _summary(outcome: Outcome) -> str:
    dense = sum(layer.form == "dense" for layer in outcome.layers)
    flags = sum(flagged(layer) for layer in outcome.layers)
    words = [f"{len(outcome.layers)} sites, {dense} kept dense, method {outcome.method}"]
    budget = budget_reached(outcome)
    words.append(f"asked {budget.asked_text}, reached {budget.reached_text}" if budget else outcome.budget)
    if outcome.predicted_loss is not None:
        words.append(f"predicted rise of the loss {fmt.figure(outcome.predicted_loss)}")
    if flags:
        words.append(f"{flags} held-out errors above twice the predicted ones")
    words.append(fmt.seconds(outcome.seconds))
    return "; ".join(words)


def _quality(evaluation: Evaluation) -> Table:
    table = plain_table("quality", "mean", "95 % interval", "n")
    for name, value in evaluation.metrics.items():
        label = metric_of(name).label
        table.add_row(Text(label), fmt.mean(value), fmt.interval(value), fmt.count(value.n))
    return table


def _speed(evaluation: Evaluation) -> Table:
    table = plain_table("latency", "before", "after", "speed")
    for run in evaluation.latency:
        label = f"batch {run.batch} × {run.length}"
        table.add_row(label, fmt.seconds(run.base), fmt.seconds(run.model), fmt.times(run.speedup))
    return table


def plain_table(*headings: str, words: int = 1) -> Table:
    """A table whose first ``words`` columns hold words and the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right", overflow="fold")
    return table
