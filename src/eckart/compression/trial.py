"""One method at one size on the learned problem: the measurement that the claims share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from eckart.compression.factorise import cut
from eckart.compression.method import Prepared
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments

Decompose = Callable[[Mapping[str, Tensor], SiteMoments | None], Prepared]
"""A method's ``prepare`` with its options filled in."""

LINEAR = ("mix", "up", "down", "head")
"""The four linear maps of the problem, as opposed to its embedding."""


def uniform_rank(weight: Tensor, keep: float) -> int:
    """The rank at which two factors take the share ``keep`` of the parameters of ``weight`` (m, n), at least 1."""
    m, n = weight.shape
    return max(1, int(keep * m * n / (m + n)))


def rise(
    decompose: Decompose,
    moments: Mapping[str, SiteMoments],
    keep: float,
    names: Sequence[str] = LINEAR,
) -> float:
    """Held-out loss rise (nats per byte) with every map in ``names`` cut to the share ``keep`` of its parameters."""
    problem = learned_problem()
    forms = {}
    for name in names:
        weights = problem.weights(name)
        forms[name] = cut(decompose(weights, moments[name]), uniform_rank(weights["weight"], keep), "lowrank")
    return problem.rise(forms)
