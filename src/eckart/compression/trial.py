"""One method at one size on the learned problem: the measurement that the claims share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from eckart.compression.factorise import cut
from eckart.compression.method import Prepared
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments

Decompose = Callable[[Mapping[str, Tensor], SiteMoments | None], Prepared]
"""A method's ``prepare`` with its options filled in."""

LINEAR = ("mix", "up", "down", "head")
"""The four linear maps of the problem, as opposed to its embedding."""

KEEPS = (0.8, 0.6, 0.4)
"""Shares of the parameters kept; 20, 40 and 60 % removed, as papers report them."""

SEEDS = (0, 1, 2)
"""Of the calibration samples."""


@functools.cache
def calibrations() -> tuple[dict[str, SiteMoments], ...]:
    """The moments of 8192 predictions for each of the SEEDS; about 4 s, once per process."""
    return tuple(learned_problem().moments(seed=seed) for seed in SEEDS)


def uniform_rank(weight: Tensor, keep: float) -> int:
    """The rank at which two factors take the share ``keep`` of the parameters of ``weight``, at least 1."""
    m, n = weight.shape
    return max(1, int(keep * m * n / (m + n)))


def rise(decompose: Decompose, moments: Mapping[str, SiteMoments], keep: float, names: Sequence[str] = LINEAR) -> float:
    """Held-out loss rise (nats per byte) with ``names`` cut to the share ``keep`` of their parameters."""
    problem = learned_problem()
    forms = {}
    for name in names:
        weights = problem.weights(name)
        forms[name] = cut(decompose(weights, moments[name]), uniform_rank(weights["weight"], keep), "lowrank")
    return problem.rise(forms)


def rises(decompose: Decompose, keeps: Sequence[float] = KEEPS) -> dict[float, float]:
    """For each of ``keeps`` the loss rise, as a mean over the calibration samples."""
    return {keep: fmean(rise(decompose, moments, keep) for moments in calibrations()) for keep in keeps}


def as_figures(name: str, rises: Mapping[float, float]) -> dict[str, float]:
    """``{"kfac at keep 0.6": 0.1 …}``, as a verdict shows them."""
    return {f"{name}: loss rise at keep {keep:g}": value for keep, value in rises.items()}
