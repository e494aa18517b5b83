"""Narrower MLPs on the learned problem: the measurement that the claims share."""

from __future__ import annotations

from statistics import fmean

from eckart.arch import MLP, Rows
from eckart.compression.factorise import cut
from eckart.compression.trial import Decompose, calibrations, uniform_rank
from eckart.evidence import learned_problem
from eckart.forms import Dense, Form
from eckart.modules.prepare import Scores, prepare_unit
from eckart.modules.units import UnitFacts
from eckart.records import Unit

KEEPS = (0.7, 0.5, 0.3)
"""Shares of the neurons kept."""


def narrow_rise(scores: Scores, keep: float) -> float:
    """Held-out loss rise (nats per byte) with ``keep`` of the 384 neurons, mean over the calibration samples."""
    problem = learned_problem()
    weights = {name: problem.weights(name) for name in ("up", "down")}
    down = weights["down"]["weight"]
    width = down.shape[1]
    facts = MLP(name="block", inputs=(Rows(site="up", stop=width),), down="down", width=width, depth=0, gated=False)
    unit = Unit(name="block#neurons", kind="neurons", sites=("up", "down"), full_rank=width, width_parameters=0,
                width_indices=0)  # fmt: skip
    found = []
    for moments in calibrations():
        prepared = prepare_unit(UnitFacts(unit, facts), weights, moments, scores)
        kept = round(keep * width)
        _, dense, bias = prepared.stand_in(kept)
        found.append(problem.rise({"down": Dense(weight=dense, bias=bias)}))
    return fmean(found)


def factored_rise(decompose: Decompose, keep: float) -> float:
    """The same with both maps factored, each to the share ``keep`` of its parameters."""
    problem = learned_problem()
    found = []
    for moments in calibrations():
        forms: dict[str, Form] = {}
        for name in ("up", "down"):
            weights = problem.weights(name)
            prepared = decompose(weights, moments[name])
            forms[name] = cut(prepared, uniform_rank(weights["weight"], keep), "lowrank")
        found.append(problem.rise(forms))
    return fmean(found)
