"""Maps of the learned problem, rounded and repaired: the measurement that the claims share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from eckart.compensation.method import Repair
from eckart.compression.trial import LINEAR, calibrations
from eckart.evidence import learned_problem
from eckart.forms import Dense
from eckart.linalg import round_groups
from eckart.moments import SiteMoments

__all__ = ["BITS", "LINEAR", "RANKS", "Fix", "as_figures", "calibrations", "rises", "rounded"]

BITS = 4
RANKS = (4, 8, 16)
"""Of repairs of maps whose smaller side is 96."""

Fix = Callable[[Tensor, Tensor, SiteMoments, int], Repair]
"""A method's ``repair`` with its options filled in: (W, Ŵ, moments, rank)."""


def rounded(weight: Tensor) -> Tensor:
    """The weight rounded to the nearest of 2⁴ values, row by row, nothing searched and nothing fed back."""
    return round_groups(weight, bits=BITS, clip=False).dense()


def rises(fix: Fix, ranks: Sequence[int] = RANKS, samples: int = 3) -> dict[int, float]:
    """Held-out loss rise (nats per byte) of all linear maps rounded, by rank of their repairs; rank 0 is unrepaired.

    Means over the first ``samples`` calibration samples.
    """
    problem = learned_problem()
    weights = {name: problem.weights(name)["weight"] for name in LINEAR}
    damaged = {name: rounded(weight) for name, weight in weights.items()}
    found = {0: problem.rise({name: Dense(weight) for name, weight in damaged.items()})}
    for rank in ranks:
        found[rank] = fmean(
            problem.rise(
                {name: Dense(_repaired(fix, weights[name], damaged[name], moments[name], rank)) for name in LINEAR}
            )
            for moments in calibrations()[:samples]
        )
    return found


def _repaired(fix: Fix, weight: Tensor, approximation: Tensor, moments: SiteMoments, rank: int) -> Tensor:
    return approximation + fix(weight, approximation, moments, rank).form.dense()


def as_figures(name: str, found: Mapping[int, float]) -> dict[str, float]:
    """``{"eora: loss rise at rank 8": 0.01 …}``, as a verdict shows them."""
    return {f"{name}: loss rise at rank {rank}": value for rank, value in found.items()}
