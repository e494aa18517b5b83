"""The report of a compression: one HTML file that needs no network, prints, and works without its script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.records import Evaluation, Interval, Outcome
from eckart.report import format as fmt
from eckart.report import view
from eckart.report.document import document
from eckart.report.layout import maps
from eckart.report.verdict import budget_reached, flagged, verdict, verdict_text

LONG_PLAN = 120_000
"""A longer plan is shown with one line per step instead of one line per entry."""


def render_report(
    outcome: Outcome,
    *,
    plan_json: str,
    evaluation: Evaluation | None = None,
    certificate: object | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
    title: str,
    command: str,
    meta: Mapping[str, str] | None = None,
) -> str:
    """The whole page as text, under 800 kB for 500 layers.

    ``certificate`` is what :func:`eckart.evaluation.certify` gives, or anything with the attributes
    ``predicted`` (a number), ``measured`` (a number or an Interval), ``ratio`` and ``warning`` (text, None).
    ``curves`` maps a site's name to its relative errors at ranks spaced evenly from 0 to the full rank
    (:func:`eckart.report.sample_curve` makes them). ``meta`` is shown under the title, name beside value.
    """
    table = view.rows(outcome)
    found_maps, outside = maps(table)
    return document(
        "report.html.j2",
        styles=["report.css"],
        scripts=["page.js", "report.js"],
        kind="compression report",
        title=title,
        meta=dict(meta or {}),
        command=command,
        outcome=outcome,
        evaluation=evaluation,
        verdict=verdict(outcome, evaluation, title),
        verdict_text=verdict_text(outcome, evaluation, title),
        rows=table,
        maps=found_maps,
        outside=outside,
        panels=view.panels(table, curves or {}),
        site_cards=view.size_cards(outcome.sites_before, outcome.sites_after),
        model_cards=view.size_cards(outcome.model_before, outcome.model_after),
        disk=view.disk_card(evaluation) if evaluation else None,
        quality=view.quality_cards(evaluation) if evaluation else (),
        speed=view.speed_cards(evaluation) if evaluation else (),
        glossary=view.glossary(evaluation),
        dense=sum(layer.form == "dense" for layer in outcome.layers),
        flagged=sum(flagged(layer) for layer in outcome.layers),
        budget=budget_reached(outcome),
        certificate=_certificate(certificate),
        plan=_readable(plan_json),
        notes=(*outcome.notes, *(evaluation.warnings if evaluation else ())),
    )


def _certificate(certificate: object | None) -> dict[str, Any] | None:
    """The certificate's figures with the lengths of its two bars."""
    if certificate is None:
        return None
    predicted: float | None = getattr(certificate, "predicted", None)
    found: Interval | float | None = getattr(certificate, "measured", None)
    measured = found.mean if isinstance(found, Interval) else found
    longest = max(predicted or 0.0, measured or 0.0) or 1.0
    return {
        "predicted": fmt.figure(predicted),
        "measured": fmt.figure(measured),
        "interval": f"95{fmt.SPACE}% interval {fmt.interval(found)}" if isinstance(found, Interval) else "",
        "ratio": getattr(certificate, "ratio", None),
        "warning": getattr(certificate, "warning", None) or "",
        "quantity": getattr(certificate, "quantity", ""),
        "predicted_bar": max(0.0, predicted or 0.0) / longest,
        "measured_bar": max(0.0, measured or 0.0) / longest,
    }


def _readable(plan_json: str) -> str:
    """A plan as it is, or with one line per step where it would be very long."""
    if len(plan_json) <= LONG_PLAN:
        return plan_json
    tree = json.loads(plan_json)
    parts = []
    for key, value in tree.items():
        if isinstance(value, list):
            lines = ",\n".join("    " + json.dumps(v, separators=(",", ":"), ensure_ascii=False) for v in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}"
