"""Removing what is not needed: masks, selectors, refit, schedules, sparse training."""

from eckart.prune.table import PRUNING

__all__ = [
    "PRUNING",
]
