"""Adaptation methods: a change of a weight with few numbers to train. Tensors and small modules; PEFT is in ``hf``."""

from eckart.adaptation.budget import CAP, SPREADS, Spread, gains, limit, spread_ranks
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source, difference
from eckart.adaptation.pissa import QuantisedSplit, quantised_split
from eckart.adaptation.table import ADAPTATIONS, adapt_options, get_adaptation

__all__ = [
    "ADAPTATIONS",
    "CAP",
    "SPREADS",
    "AdaptMethod",
    "Delta",
    "Layout",
    "QuantisedSplit",
    "Source",
    "Spread",
    "adapt_options",
    "difference",
    "gains",
    "get_adaptation",
    "limit",
    "quantised_split",
    "spread_ranks",
]
