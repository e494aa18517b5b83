"""Who stays: scores of units from weights and gradients, and how a budget is shared between layers.

A unit is what stays or goes as one: a weight, a run, a row, a neuron with all its weights. A selector sees, for every
set of units, sums over each unit, and gives one score per unit, the higher the longer it stays. It knows nothing of
layers, masks or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.errors import InputError, problems, unknown

Allocation = Literal["global", "uniform", "erk"]
"""``global``: one budget over all layers; ``uniform``: the same share in each; ``erk``: as :func:`erk_shares` says."""


class View:
    """One set of units as selectors see it. Every method gives one number per unit, in float32 or wider."""

    def __init__(
        self, name: str, size: int, total: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor], has_gradient: bool
    ) -> None:
        self.name = name
        self.size = size
        """Weights in one unit."""
        self.has_gradient = has_gradient
        self._total = total

    def weight_square(self) -> Tensor:
        """‖w‖² of each unit."""
        return self._total(lambda w, g: w.square())

    def gradient_square(self) -> Tensor:
        """‖g‖² of each unit."""
        return self._total(lambda w, g: g.square())

    def product(self) -> Tensor:
        """⟨w, g⟩ of each unit."""
        return self._total(lambda w, g: w * g)


Views = Mapping[str, View]
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to score units, and how the budget is shared where the caller does not say."""

    name: str
    score: Callable[[Views], Scores]
    needs_gradient: bool = False
    allocation: Allocation = "uniform"
    floor: float = 0.0
    """Share of all weights that each layer keeps at least, where the budget is global."""


def magnitude(views: Views) -> Scores:
    """Root mean square of the weights of a unit: |w| for single weights."""
    return {name: (view.weight_square() / view.size).sqrt() for name, view in views.items()}


def gradient(views: Views) -> Scores:
    """Root mean square of the gradient of a unit."""
    return {name: (view.gradient_square() / view.size).sqrt() for name, view in views.items()}


def taylor(views: Views) -> Scores:
    """|⟨w, g⟩|, the first-order change of the loss when the unit goes."""
    return {name: view.product().abs() for name, view in views.items()}


def saliency(views: Views) -> Scores:
    """The five criteria of HESSO, each divided by its norm over all units of all sets, with equal weights.

    ‖w‖, ‖w‖ / size, 1 + cos(w, g), |⟨w, g⟩| and ½⟨w, g⟩². The sign in the cosine is that of the authors' code.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in views}
    for name, view in views.items():
        norm, slope, product = view.weight_square().sqrt(), view.gradient_square().sqrt(), view.product()
        cosine = product / (norm * slope).clamp_min(1e-30)
        parts[name] = [norm, norm / view.size, 1 + cosine, product.abs(), product.square() / 2]
    norms = [math.sqrt(sum(float(p[i].double().square().sum()) for p in parts.values())) for i in range(5)]
    return {
        name: torch.stack([0.2 * p / max(norm, 1e-30) for p, norm in zip(five, norms, strict=True)]).sum(0)
        for name, five in parts.items()
    }


def fixed(scores: Mapping[str, Tensor], name: str = "fixed") -> Selector:
    """A selector of scores that are known beforehand, by set: those of :func:`cric_scores`, or anyone's."""

    def lookup(views: Views) -> Scores:
        if missing := [view for view in views if view not in scores]:
            raise InputError(problems("there are no scores for these sets", missing))
        return {view: scores[view] for view in views}

    return Selector(name, lookup, allocation="global")


MINIMUM = 0.0005
"""0.05 % of all weights: the Minimum Threshold of Global MP."""

SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector("global-mp", magnitude, allocation="global", floor=MINIMUM),
        Selector("magnitude", magnitude),
        Selector("gradient", gradient, needs_gradient=True),
        Selector("taylor", taylor, needs_gradient=True, allocation="global", floor=MINIMUM),
        Selector("saliency", saliency, needs_gradient=True, allocation="global"),
    )
}
"""The selectors that have a name."""


def find_selector(selector: str | Selector) -> Selector:
    """The selector of that name, or the one given. Raises InputError for names that do not exist."""
    if isinstance(selector, Selector):
        return selector
    if selector not in SELECTORS:
        raise InputError(unknown("selector", str(selector), SELECTORS))
    return SELECTORS[selector]


def erk_shares(shapes: Mapping[str, tuple[int, ...]], keep: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel: the share that each layer keeps, ∝ (sum of its dimensions) / (product of them).

    ``shapes``: of the stored weights, kernels included. Layers that would keep more than all stay dense, and the others
    share what is left, so that ``keep`` of all weights stay.
    """
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    budget = keep * sum(numbers.values())
    while len(dense) < len(raw):
        left = budget - sum(numbers[name] for name in dense)
        scale = left / sum(raw[name] * numbers[name] for name in raw if name not in dense)
        full = {name for name in raw if name not in dense and scale * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in raw}
        dense |= full
    return dict.fromkeys(raw, 1.0)
