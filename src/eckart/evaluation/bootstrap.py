"""How sure a figure is: percentile bootstrap over the units that were drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.records import Interval

RESAMPLES = 1000
COVERAGE = 0.95


def resample(n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each of n units occurs in each resample with replacement: (resamples, n), float64."""
    if n < 1 or resamples < 1:
        raise InputError(f"a bootstrap needs at least one unit and one resample; got {n} and {resamples}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, n, dtype=torch.float64)
    )


def bootstrap(values: Tensor, weights: Tensor | None = None, *, counts: Tensor, unit: str = "") -> Interval:
    """Σ values / Σ weights over n units, with the 95 % interval over the resamples ``counts`` (resamples, n).

    ``values`` (n,) are sums over a unit and ``weights`` (n,) what they are counted by (tokens, bytes); None
    counts units, which gives the mean. Passing the same ``counts`` for several figures pairs them.
    Raises InputError for lengths that differ, weights that sum to nothing, and values that are not finite.
    """
    values = values.double().cpu()
    weights = torch.ones_like(values) if weights is None else weights.double().cpu()
    if values.ndim != 1 or values.shape != weights.shape or counts.shape[1:] != values.shape:
        raise InputError(
            f"expected values and weights (n,) and counts (resamples, n); got {tuple(values.shape)}, "
            f"{tuple(weights.shape)}, {tuple(counts.shape)}."
        )
    if not bool(torch.isfinite(values).all()) or not float(weights.sum()) > 0:
        raise InputError("expected finite values and weights with a positive sum; check the models' outputs for NaN.")
    below = counts @ weights
    drawn = ((counts @ values)[below > 0]) / below[below > 0]
    return interval(float(values.sum() / weights.sum()), drawn, n=len(values), unit=unit)


def interval(mean: float, drawn: Tensor, *, n: int, unit: str = "") -> Interval:
    """The record of a figure and the percentiles of its resampled values ``drawn`` (resamples,)."""
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(drawn.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean=mean, low=low, high=high, n=n, unit=unit)
