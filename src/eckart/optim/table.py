"""Every optimizer by name. A new one is one file and one line here."""

from __future__ import annotations

from eckart.optim import (
    adamp,
    apollo,
    auon,
    coordinate,
    dct_adamw,
    diffgrad,
    dion,
    fira,
    frugal,
    galore,
    lanczos_rates,
    mfac,
    muon,
    scaling,
    sgdp,
    trion,
)
from eckart.records import Technique

_ALL: tuple[Technique, ...] = (
    galore.METHOD,
    fira.METHOD,
    apollo.METHOD,
    frugal.METHOD,
    dct_adamw.METHOD,
    muon.METHOD,
    dion.METHOD,
    trion.METHOD,
    auon.METHOD,
    adamp.METHOD,
    sgdp.METHOD,
    diffgrad.METHOD,
    mfac.METHOD,
    coordinate.METHOD,
    lanczos_rates.METHOD,
    scaling.METHOD,
)

OPTIMIZERS: dict[str, Technique] = {method.name: method for method in _ALL}
"""In the order in which they are shown."""
