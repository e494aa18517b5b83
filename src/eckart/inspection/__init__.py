"""A look at everything that a model or a file of weights holds."""

from eckart.inspection.logger import FindingLogger
from eckart.inspection.observe import observations
from eckart.inspection.record import Inspection, MatrixFacts, Observation, Panel, Severity, Tier
from eckart.inspection.run import inspect_weights
from eckart.inspection.source import WeightsLike

__all__ = [
    "FindingLogger",
    "Inspection",
    "MatrixFacts",
    "Observation",
    "Panel",
    "Severity",
    "Tier",
    "WeightsLike",
    "inspect_weights",
    "observations",
]
