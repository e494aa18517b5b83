"""The record of a method that works while a model is trained, or needs training to work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eckart.records import Claim, Paper


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """A training-time method, as a value for tables, docs and claims; ``entry`` is what people use."""

    name: str
    summary: str
    paper: Paper
    entry: Any
    """The public class or function, such as ``TrainedRankPruning``."""
    claim: Claim
