"""How far Σ is to be trusted, found out on the two halves of a calibration.

*What it does.* For every matrix, decomposes with each ρ of a grid on half A and measures on half B, and the other way
round; the ρ with the least geometric mean of the relative errors, over both directions and three ranks, is taken. It
stands behind ``kfac``'s option ``input_shrinkage="auto"``.

*Formula.* Fitted on A: Ŵ_A(ρ, k) under G_s and (1 − ρ) Σ_A + ρ diag(Σ_A). Measured on B, without any shrinkage:
tr(G_B ΔW Σ_B ΔWᵀ) / tr(G_B W Σ_B Wᵀ), Σ centred where the bias takes up the mean.

*Cost.* Two decompositions for each ρ and matrix, twelve in all; ``certify`` takes them once more.

*When it does not help.* The halves are rows of one sample: they tell noise from signal, but know nothing of another
domain. Each half has half of the tokens, so ρ comes out a little larger than the whole needs. Measured on a small
causal LM at equal ranks (``benchmarks/refine.py``; rise of the loss in nats per token at 20 / 40 / 60 % removed): on
8 windows .209 / .629 / 1.598 by tokens and .195 / .594 / 1.578 with "auto", and on text of another domain .194 / .388
/ 1.025 and .194 / .348 / .964; on 60 windows .154 / .509 / 1.381 and .156 / .501 / 1.388, on the other domain .198 /
.332 / .853 and .194 / .325 / .840. So it is for few tokens and foreign text; with many tokens it buys nothing within
the domain, and the default stays as it is. A full Σ does overfit its domain: outside of it, whitening loses to the
diagonal of ``asvd`` at 20 % removed (.206 to .160 on 60 windows), and no ρ wins that back; from 40 % on it wins there.

*Departs from the paper in.* O. Ledoit and M. Wolf, “A well-conditioned estimator for large-dimensional covariance
matrices”, 2004, derive one ρ from the error of Σ itself; here the error of the approximated map decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from eckart.apply.error import relative_error
from eckart.compression import kfac
from eckart.moments import SiteMoments

GRID = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
"""The ρ that are tried."""
_SHARES = (0.125, 0.25, 0.5)
"""Of the full rank: where the errors are taken."""


def wants_halves(options: Any) -> bool:
    """Whether the options leave ρ to the two halves of the calibration."""
    return isinstance(options, kfac.Options) and options.input_shrinkage == "auto"


def held_out_errors(
    weights: Mapping[str, Tensor], halves: tuple[SiteMoments, SiteMoments], options: kfac.Options
) -> dict[float, float]:
    """For each ρ of the grid the geometric mean of the relative errors on the half that the fit has not seen."""
    found = {}
    for rho in GRID:
        logs = []
        for fitted, other in (halves, halves[::-1]):
            prepared = kfac.prepare(weights, fitted, replace(options, input_shrinkage=rho))
            full = len(prepared.errors) - 1
            for rank in sorted({max(1, int(share * full)) for share in _SHARES}):
                stand_in = prepared.left[:, :rank] @ prepared.right[:rank]
                error = relative_error(prepared.weight, stand_in, other, centred=prepared.mean is not None)
                logs.append(math.log(max(error, 1e-30)))
        found[rho] = math.exp(sum(logs) / len(logs))
    return found


def chosen(
    weights: Mapping[str, Tensor], halves: tuple[SiteMoments, SiteMoments], options: kfac.Options
) -> kfac.Options:
    """The options with the ρ of least error in the place of "auto"; the smaller ρ where two are alike."""
    errors = held_out_errors(weights, halves, options)
    rho = min(errors, key=lambda tried: errors[tried])
    return replace(options, input_shrinkage=rho)
