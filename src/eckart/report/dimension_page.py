"""The intrinsic dimension of data as a page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from eckart.records import Finding
from eckart.report import format as fmt
from eckart.report.document import document
from eckart.report.measures import measure_of
from eckart.report.panels import Curves, drawn_panel, finding_text
from eckart.report.terminal import plain_table

if TYPE_CHECKING:
    from eckart.geometry import DimensionCurve


def dimension_curves(curve: DimensionCurve) -> Curves:
    """For each estimator its readings by the number of points, the finest scale last."""
    lines = {
        measure_of(name).label: [(float(f.n), f.value) for f in reversed(found) if f.n and f.value is not None]
        for name, found in curve.curves.items()
    }
    return {name: line for name, line in lines.items() if line}


def render_dimension(
    curve: DimensionCurve, *, title: str, command: str = "", meta: Mapping[str, str] | None = None
) -> str:
    """The whole page as text; it needs no network and no script."""
    head, _, rest = curve.verdict.partition(":")
    return document(
        "dimension.html.j2",
        styles=["report.css", "inspection.css"],
        scripts=["page.js"],
        kind="dimension",
        title=title,
        notes=(),
        meta=dict(meta or {}) | {"rows": fmt.count(curve.n), "features": fmt.count(curve.features)},
        command=command,
        verdict=((head, True), (f":{rest}" if rest else "", False)),
        verdict_text=curve.verdict,
        panel=drawn_panel(
            "Dimension over scale",
            "",
            [],
            dimension_curves(curve),
            x="points (more of them look closer)",
            y="dimension",
        ),
        headings=[measure_of(name).label for name in curve.curves],
        lines=_lines(curve),
        remarks=_remarks(curve),
        words=[(measure_of(name).label, measure_of(name).meaning) for name in curve.curves],
    )


def render_dimension_terminal(curve: DimensionCurve) -> RenderableType:
    """Verdict, table and notes, ready for ``rich.console.Console.print``."""
    table = plain_table("points", *(measure_of(name).label for name in curve.curves))
    for points, cells in _lines(curve):
        table.add_row(points, *cells)
    parts: list[RenderableType] = [Text(curve.verdict, style="bold"), Text(), table]
    if remarks := _remarks(curve):
        parts += [Text(), *(Text(f"note: {note}", style="yellow") for note in remarks)]
    return Group(*parts)


def _lines(curve: DimensionCurve) -> list[tuple[str, list[str]]]:
    """A row per scale: points, and what each estimator reads there."""
    levels = list(zip(*curve.curves.values(), strict=True))
    return [(_points(level), [_cell(finding) for finding in level]) for level in levels]


def _points(level: tuple[Finding, ...]) -> str:
    first = level[0].details
    many = f"{first['subsamples']}{fmt.SPACE}×{fmt.SPACE}" if first.get("subsamples", 1) > 1 else ""
    return f"{many}{first.get('points', level[0].n)}"


def _cell(finding: Finding) -> str:
    return fmt.NONE if finding.value is None else finding_text(replace(finding, n=None, notes=()))


def _remarks(curve: DimensionCurve) -> tuple[str, ...]:
    """Notes of the data, then those of the estimators, each once."""
    said = [
        f"{measure_of(name).label}: {note}"
        for name, found in curve.curves.items()
        for f in found[:1]
        for note in f.notes
    ]
    return tuple(dict.fromkeys((*curve.notes, *said)))
