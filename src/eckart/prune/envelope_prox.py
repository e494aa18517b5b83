"""The proximal operator of half the squared k-support norm over groups, exactly, by one sort."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError


def envelope_prox(norms: Tensor, k: int, strength: float, weights: Tensor | None = None) -> Tensor:
    """The factor in [0, 1] by which each group is multiplied: prox of λ·S_k, S_k the envelope of at most k groups.

    ``norms`` (n,): ‖v_j‖ of the groups; 0 ≤ k ≤ n; ``strength``: λ ≥ 0; ``weights`` (n,): d_j > 0, by default 1. S_k is
    the largest convex function below ½ Σ d_j ‖x_j‖² on the x with at most k groups that are not 0. Then
    x_j = v_j u_j / (u_j + λ d_j) with u_j = clip(α √d_j ‖v_j‖ − λ d_j, 0, 1) and α such that Σ u_j = k. The sum grows
    with α and is linear between 2n known points, so a sort finds α. Where fewer than k groups are not 0 all of these
    have u_j = 1. Cost: O(n log n). Raises InputError for numbers out of range.
    """
    n = norms.numel()
    if norms.ndim != 1 or not 0 <= k <= n or not 0 <= strength < float("inf"):
        raise InputError(
            f"envelope_prox: expected norms (n,), 0 ≤ k ≤ n, λ ≥ 0; got {tuple(norms.shape)}, {k}, {strength}."
        )
    v = norms.double()
    d = torch.ones_like(v) if weights is None else weights.to(v)
    if strength == 0 or k == 0 or n == 0:
        return (torch.ones_like(v) * float(k > 0)).to(norms.dtype)
    alive = v > 0
    u = alive.double()
    if int(alive.sum()) > k:
        slope, offset = d[alive].sqrt() * v[alive], strength * d[alive]
        points = torch.cat([offset / slope, (1 + offset) / slope])  # where u_j leaves 0, where it reaches 1
        points, order = points.sort()
        slopes = torch.cat([slope, -slope])[order].cumsum(0)
        sums = torch.cat([slope.new_zeros(1), (slopes[:-1] * points.diff()).cumsum(0)])  # Σ u_j at each point
        i = int(torch.searchsorted(sums, float(k), right=True).clamp(1, len(points) - 1)) - 1
        alpha = points[i] + (k - sums[i]) / slopes[i].clamp_min(1e-300)
        u[alive] = (alpha * slope - offset).clamp(0, 1)
    return (u / (u + strength * d)).to(norms.dtype)
