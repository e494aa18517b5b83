"""The output error of an approximation, exactly, from second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.moments import SiteMoments


def weighted_square(delta: Tensor, moments: SiteMoments, *, centred: bool) -> float:
    """tr(G Δ Σ Δᵀ) for Δ (out × in).

    Σ is the covariance where ``centred`` (a bias takes up the mean), else the second moment E[x xᵀ];
    G is the gradient moment where it was collected, else the identity. Cost: m·n·(m + n).
    """
    delta = delta.to("cpu", torch.float64)
    second = moments.covariance if centred else moments.second
    if second is None:
        second = moments.second
    if second is None:
        weighted = delta
    elif second.ndim == 1:
        weighted = delta * second
    else:
        weighted = delta @ second
    if moments.gradient is not None:
        delta = moments.gradient @ delta
    return max(float((weighted * delta).sum()), 0.0)


def relative_error(weight: Tensor, approximation: Tensor, moments: SiteMoments, *, centred: bool) -> float:
    """tr(G ΔW Σ ΔWᵀ) / tr(G W Σ Wᵀ), in [0, 1] for every sensible Ŵ; 0 for a map that never spoke."""
    weight = weight.to("cpu", torch.float64)
    total = weighted_square(weight, moments, centred=centred)
    if total == 0.0:
        return 0.0
    delta = weight - approximation.to("cpu", torch.float64)
    return weighted_square(delta, moments, centred=centred) / total
