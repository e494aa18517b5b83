"""An inspection in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from eckart.report import format as fmt
from eckart.report import inspection_view as view
from eckart.report.measures import heading, measure_of
from eckart.report.panels import finding_text
from eckart.report.terminal import plain_table

if TYPE_CHECKING:
    from eckart.inspection.record import Inspection, Observation

STYLES = {"broken": "bold red", "warning": "yellow", "advice": "cyan", "good": "green"}


def render_inspection_terminal(inspection: Inspection) -> RenderableType:
    """Verdict, findings, table and panels, ready for ``rich.console.Console.print``."""
    shown, more = view.split_observations(inspection)
    parts: list[RenderableType] = [Text(view.verdict_line(inspection), style="bold")]
    for observation in shown:
        parts += [Text(), *_observation(observation)]
    if more:
        parts += [Text(), Text(f"{len(more)} more findings: give -o report.html or --json to see them.", style="dim")]
    parts += [Text(), _table(inspection)]
    for words, counts in (("measured", view.skipped(inspection)), ("compared", view.uncompared(inspection))):
        if counts:
            parts += [Text(), Text(f"not {words}: " + ", ".join(f"{n} ({reason})" for reason, n in counts))]
    for panel in inspection.panels:
        parts += [Text(), Text(panel.title, style="bold"), Text(panel.words.replace("`", ""))]
        parts += [Text(f"  {measure_of(f.name).label}: {finding_text(f)}") for f in panel.findings]
    return Group(*parts)


def _observation(observation: Observation) -> list[Text]:
    sign, word = view.SEVERITIES[observation.severity]
    claim = observation.claim.replace("`", "")
    lines = [Text.assemble((f"{sign} {word}  ", STYLES[observation.severity]), (claim, "bold"))]
    said = f"{fmt.sentence(observation.number)} {observation.why}".replace("`", "").strip()
    lines += [Text(f"  {said}")] if said else []
    return lines + ([Text(f"  $ {observation.command}", style="dim")] if observation.command else [])


def _table(inspection: Inspection) -> RenderableType:
    columns = view.columns(inspection)
    table = plain_table("weight", "in × out", *map(heading, columns))
    for row in view.rows(inspection):
        if not row.facts.skipped:
            mark = f" {view.SEVERITIES[row.noted][0]}" if row.noted else ""
            table.add_row(Text(row.name + mark), row.shape, *(text for text, _ in row.cells))
    return table
