"""Panels: a measurement beyond the weights, its words, its curves and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from eckart.records import Finding
from eckart.report import charts
from eckart.report import format as fmt
from eckart.report.measures import measure_of

if TYPE_CHECKING:
    from eckart.inspection.record import Panel

Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class PanelView:
    """A panel as the page shows it."""

    title: str
    words: str
    drawing: Markup
    """Empty where there is no curve."""
    names: tuple[tuple[str, int, int], ...]
    """Each line's name, pattern and colour."""
    findings: tuple[tuple[str, str], ...]


def panel_view(panel: Panel) -> PanelView:
    """``panel`` with its curves drawn and its findings in words."""
    return drawn_panel(panel.title, panel.words, panel.findings, panel.curves, panel.x, panel.y)


def drawn_panel(title: str, words: str, findings: Sequence[Finding], curves: Curves, x: str, y: str) -> PanelView:
    """The same from its parts; ``x`` and ``y`` name the axes."""
    return PanelView(
        title=title,
        words=words,
        drawing=charts.plot(curves, x=x, y=y, label=title),
        names=tuple((name, *charts.line_style(i)) for i, name in enumerate(curves)),
        findings=tuple((measure_of(finding.name).label, finding_text(finding)) for finding in findings),
    )


def finding_text(finding: Finding) -> str:
    """A finding without its name: value, uncertainty, unit, sample size and notes."""
    rest = [f"n = {fmt.count(finding.n)}"] if finding.n is not None else []
    said = "; ".join([*rest, *finding.notes])
    if finding.value is None:
        return f"not measured{f' ({said})' if said else ''}"
    width = f" ±{fmt.SPACE}{fmt.figure(finding.uncertainty, 2)}" if finding.uncertainty else ""
    unit = f" {finding.unit}" if finding.unit else ""
    sign = f"≥{fmt.SPACE}" if finding.at_least else ""
    return f"{sign}{fmt.figure(finding.value)}{width}{unit}{f' ({said})' if said else ''}"
