"""Ranks by budget: numbers to train are given to the layers where a direction more brings most."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from eckart.adaptation.method import Layout, Source
from eckart.errors import BudgetError, InputError, unknown
from eckart.records import Budget

Spread = Literal["weight", "activation", "gradient"]
"""What a direction is worth: its share of the energy of W, of the variance of the inputs, or the energy of the
gradient of the loss along it."""
SPREADS = get_args(Spread)
CAP = 64
"""Highest rank of a layer under a budget where ``r`` does not say otherwise."""


def limit(budget: Budget, layouts: Sequence[Layout], model_parameters: int) -> int:
    """Numbers to train that a budget allows: ``parameters`` of them, ``keep`` as a share of the adapted maps' own,
    ``model_keep`` as a share of the whole model's.

    Raises InputError for the other units, which say nothing about an adapter.
    """
    if budget.parameters is not None:
        return int(budget.parameters)
    if budget.keep is not None:
        return int(budget.keep * sum(layout.weight_parameters for layout in layouts))
    if budget.model_keep is not None:
        return int(budget.model_keep * model_parameters)
    raise InputError(
        f"the budget of an adapter is Budget(parameters=…), Budget(model_keep=share of the model) or Budget(keep=share "
        f"of the adapted maps); got {budget}."
    )


def gains(source: Source, spread: Spread, most: int) -> Tensor:
    """(most,) float64, never rising: what each further direction of a layer brings, summed over its slices.

    - ``weight``: σ_i² / ‖W‖², the leading singular values of the weight.
    - ``activation``: λ_i / tr C of the covariance C of the inputs (EVA); needs moments with ``mean`` and ``second``.
    - ``gradient``: λ_i(E[g gᵀ]) · tr E[x xᵀ], in squared units of the loss, so comparable between layers; needs
      moments with gradients.

    Raises InputError for moments that are missing, and an unknown ``spread``.
    """
    if spread not in SPREADS:
        raise InputError(unknown("spread", str(spread), SPREADS))
    if spread == "weight":
        S = source.leading(most)[1].square()
        total = source.weight.double().square().sum((1, 2)).cpu()
        return (S / total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).mean(0)
    found = torch.zeros(most, dtype=torch.float64)
    for moments in source.moments:
        if spread == "activation":
            matrix = moments.covariance
            scale = None if matrix is None else 1 / float(matrix.diagonal().sum().clamp(min=1e-300))
        else:
            matrix, diagonal = moments.gradient, moments.diagonal
            scale = None if diagonal is None else float(diagonal.sum())
        if matrix is None or scale is None:
            raise InputError(
                f"{source.layout.name}: ranks by {spread} need the moments of its "
                f"{'inputs' if spread == 'activation' else 'gradients'}; this layer has none (calibrate with them, or "
                "take spread='weight')."
            )
        values = torch.linalg.eigvalsh(matrix).flip(0)[:most].clamp(min=0.0) * scale
        found[: values.numel()] += values / len(source.moments)
    if not source.moments:
        raise InputError(f"{source.layout.name}: ranks by {spread} need moments; give the config moments=….")
    return found


def spread_ranks(worth: Sequence[Tensor], costs: Sequence[Callable[[int], int]], budget: int) -> list[int]:
    """A rank for each layer, 0 for none: one direction after the other, the one with most gain per number first.

    ``worth[i]`` (most,) never rises, ``costs[i](rank)`` are the numbers to train of layer i at that rank, so that the
    greedy order is the best one for costs proportional to the rank. A step that no longer fits ends its layer; the
    others go on. Raises BudgetError, naming the least, where not even one direction fits.
    """
    ranks = [0] * len(worth)
    spent = [0] * len(worth)
    left = budget

    def entry(i: int) -> tuple[float, int, int]:
        step = costs[i](ranks[i] + 1) - spent[i]
        return (-float(worth[i][ranks[i]]) / max(step, 1), i, step)

    heap = [entry(i) for i in range(len(worth)) if worth[i].numel()]
    heapq.heapify(heap)
    while heap:
        _, i, step = heapq.heappop(heap)
        if step > left:
            continue
        left -= step
        ranks[i] += 1
        spent[i] += step
        if ranks[i] < worth[i].numel():
            heapq.heappush(heap, entry(i))
    if worth and not any(ranks):
        least = min(cost(1) for cost in costs)
        raise BudgetError(f"the budget of {budget:,} numbers to train is below one direction of any layer: {least:,}.")
    return ranks
