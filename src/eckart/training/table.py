"""Every training-time method by name. A new method is one file and one line here."""

from __future__ import annotations

from eckart.records import Technique
from eckart.training import gqsa, gradient_norm, lr2vq, maestro, orth_conv, rps, saf, snnk, sso, sst, trp

TRAINING: dict[str, Technique] = {
    method.name: method
    for method in (
        trp.METHOD,
        maestro.METHOD,
        rps.METHOD,
        lr2vq.METHOD,
        gqsa.METHOD,
        snnk.METHOD,
        sst.METHOD,
        orth_conv.METHOD,
        saf.METHOD,
        sso.METHOD,
        gradient_norm.METHOD,
    )
}
"""In the order in which they are shown."""
