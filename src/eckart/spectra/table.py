"""Every diagnostic of weights by name. A new one is one file and one line here."""

from __future__ import annotations

from eckart.records import Diagnostic
from eckart.spectra import bulk, delta, faults, kinds, learning_rates, powerlaw, ranks, sparsity, windows

SPECTRA: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        ranks.METHOD,
        bulk.METHOD,
        windows.METHOD,
        powerlaw.METHOD,
        kinds.METHOD,
        faults.METHOD,
        delta.METHOD,
        learning_rates.METHOD,
        sparsity.METHOD,
    )
}
"""In the order in which they are shown."""
