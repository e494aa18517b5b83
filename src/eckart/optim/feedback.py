"""Error feedback: what the subspace left out comes back at the next step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eckart.optim.parts import knob, number_fault

Stored = Literal["fp32", "bf16", "int8"]
STORED = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Feedback:
    """X ← G + decay · E before the subspace, E ← X − (1 − keep) Q Qᵀ X after it; E is kept as ``dtype``.

    4, 2 or 1 bytes per parameter (int8 by blocks, see ``eckart.linalg.pack``; "fp32" is float64 for float64
    parameters). ``keep`` > 0 leaves a part of what was used: with keep = μ, E is the momentum of Trion and Dion.
    """

    dtype: Stored = field(default="int8", metadata={"key": "feedback"})
    decay: float = knob(1.0, "feedback_decay")
    keep: float = knob(0.0, "feedback_keep")

    def faults(self) -> list[str]:
        found = [] if self.dtype in STORED else [f"feedback is one of {', '.join(STORED)} or None; got {self.dtype!r}"]
        found += number_fault("feedback_decay", self.decay, 0, 1)
        return found + number_fault("feedback_keep", self.keep, 0, 1, open_high=True)
