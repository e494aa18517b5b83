"""What a person sees of a run: the report page, the model card, terminal tables, JSON."""

from eckart.report.card import model_card
from eckart.report.charts import sample_curve
from eckart.report.dimension_page import render_dimension, render_dimension_terminal
from eckart.report.inspection_page import inspection_note, render_inspection
from eckart.report.inspection_terminal import render_inspection_terminal
from eckart.report.outcome_json import (
    evaluation_from_json,
    evaluation_to_json,
    outcome_from_json,
    outcome_to_json,
)
from eckart.report.page import render_report
from eckart.report.terminal import render_layers, render_terminal
from eckart.report.verdict import verdict_text

__all__ = [
    "evaluation_from_json",
    "evaluation_to_json",
    "inspection_note",
    "model_card",
    "outcome_from_json",
    "outcome_to_json",
    "render_dimension",
    "render_dimension_terminal",
    "render_inspection",
    "render_inspection_terminal",
    "render_layers",
    "render_report",
    "render_terminal",
    "sample_curve",
    "verdict_text",
]
