"""Every training-time method by name. A new method is one file and one line here."""

from __future__ import annotations

from eckart.training.method import TrainingMethod

TRAINING: dict[str, TrainingMethod] = {method.name: method for method in ()}
"""In the order in which they are shown."""
