"""The page of an inspection: verdict, findings, map, table, drawings, method, in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eckart.report import inspection_view as view
from eckart.report.document import data_block, document, fragment
from eckart.report.layout import maps
from eckart.report.measures import heading, measure_of
from eckart.report.panels import panel_view

if TYPE_CHECKING:
    from eckart.inspection.record import Inspection


def render_inspection(inspection: Inspection) -> str:
    """The whole page as text, under 800 kB for a model of 224 weights.

    It works without its script, except for the drawings of single weights and the downloads; it prints, and asks
    for nothing from the network. Every text of the inspection is escaped.
    """
    shared = _shared(inspection)
    table = shared["rows"]
    mapped, elsewhere = maps([row for row in table if not row.facts.skipped])
    index = {row.full_name: row.index for row in table}
    return document(
        "inspection.html.j2",
        styles=["report.css", "inspection.css"],
        scripts=["page.js", "inspection.js"],
        kind="inspection",
        title=inspection.title,
        notes=(),
        meta=view.meta(inspection),
        command=str(inspection.meta.get("command") or ""),
        inspection=inspection,
        verdict=view.verdict(inspection),
        places={
            o.matrices: " ".join(str(index[name]) for name in o.matrices if name in index)
            for o in inspection.observations
        },
        mapped=mapped,
        elsewhere=elsewhere,
        ranked=view.ranked(inspection),
        cell_text=view.cell_text,
        ratio_words=view.ratio_words(inspection),
        skipped=view.skipped(inspection),
        uncompared=view.uncompared(inspection),
        noted=any(row.noted for row in table),
        drawn=any(not row.facts.skipped for row in table),
        panels=[panel_view(panel) for panel in inspection.panels],
        method=view.method(inspection),
        data=data_block(view.data(inspection, table)),
        **shared,
    )


def inspection_note(inspection: Inspection) -> str:
    """Verdict, findings and table as a fragment of HTML, for notebooks."""
    return fragment("note.html.j2", **_shared(inspection))


def _explained(name: str) -> str:
    return f"{measure_of(name).label}. {measure_of(name).meaning}".strip()


def _shared(inspection: Inspection) -> dict[str, Any]:
    shown, more = view.split_observations(inspection)
    return {
        "verdict_text": view.verdict_line(inspection),
        "severities": view.SEVERITIES,
        "observations": shown,
        "more": more,
        "rows": view.rows(inspection),
        "headings": [(heading(name), _explained(name)) for name in view.columns(inspection)],
    }
