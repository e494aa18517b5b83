"""Adaptation methods: a change of a weight with few numbers to train. Tensors and small modules; PEFT is in ``hf``."""

from eckart.adaptation.budget import CAP, SPREADS, Spread, gains, limit, spread_ranks
from eckart.adaptation.fedsvd import reorthogonalised, server_round
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source, difference
from eckart.adaptation.osf import energy_shares, importance_shares
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
    "energy_shares",
    "gains",
    "get_adaptation",
    "importance_shares",
    "limit",
    "quantised_split",
    "reorthogonalised",
    "server_round",
    "spread_ranks",
]
