"""What lies beside the weights of a compressed model: the model card, the report, ``eckart.json``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.checkpoint import Manifest
from eckart.evaluation import certify
from eckart.planning import Plan
from eckart.records import Evaluation, Outcome
from eckart.report import evaluation_to_json, model_card, outcome_to_json, render_report, sample_curve

CURVE_POINTS = 48
"""Points of an error curve in the report."""


def write_papers(
    folder: Path,
    *,
    base: str,
    fingerprint: str,
    plan: Plan,
    outcome: Outcome,
    curves: Mapping[str, Sequence[float]],
    calibration: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    command: str,
    evaluation: Evaluation | None = None,
    title: str = "",
    made: str = "",
) -> None:
    """Write README.md, ``report.html`` and ``eckart.json``, which lists all files that lie there by then.

    ``made`` is when, for the report; without it nothing in the files depends on the time.
    """
    version = importlib.metadata.version("eckart")
    title = title or Path(base).name
    page = render_report(
        outcome,
        plan_json=plan.dumps(),
        evaluation=evaluation,
        certificate=None if evaluation is None else certify(outcome, evaluation),
        curves={name: sample_curve(curve, CURVE_POINTS) for name, curve in curves.items()},
        title=title,
        command=command,
        meta={
            "original": Path(base).name,
            "fingerprint": fingerprint[:16],
            "calibrated on": str(calibration.get("data", "nothing")),
            "Eckart": version,
            **({"made": made} if made else {}),
        },
    )
    card = model_card(outcome, evaluation, base_name=base, title=title, command=command, native=not entries)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")
    Manifest(
        version=version,
        base=base,
        fingerprint=fingerprint,
        command=command,
        modules=entries,
        plan=plan.to_json(),
        outcome=outcome_to_json(outcome),
        evaluation=None if evaluation is None else evaluation_to_json(evaluation),
        calibration=dict(calibration),
    ).write(folder)
