"""A saved adapter knows the base that it was trained on: a few random projections of every weight travel with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from eckart.errors import EckartWarning

PROBES = 8
TOLERANCE = 0.01
"""Relative difference that is taken for rounding: bfloat16 against float32 is .002, 8 bits about .008, 4 bits .1."""
CHECK = "check"
"""Name of the buffer beside a delta's numbers that travels in its file."""
SIZE = 2 * PROBES + 1


def projections(W: Tensor) -> Tensor:
    """(PROBES,) float64: zᵢ = aᵢᵀ W bᵢ for W (slices, out, in), slices stacked, and fixed normal vectors aᵢ, bᵢ.

    Every entry of W counts, and for two matrices the mean of (z − z')² is ‖W − W'‖_F² in expectation.
    """
    rows = W.detach().float().reshape(-1, W.shape[-1])
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(PROBES, rows.shape[0], generator=generator).to(rows.device)
    b = torch.randn(PROBES, rows.shape[1], generator=generator).to(rows.device)
    return (a * (b @ rows.T)).double().sum(1).cpu()


def record(W: Tensor, delta: Tensor | None) -> Tensor:
    """(SIZE,) float64: projections of W, ‖W‖_F, projections of ΔW (zeros where there is no such matrix)."""
    change = torch.zeros(PROBES, dtype=torch.float64) if delta is None else projections(delta)
    return torch.cat([projections(W), W.detach().double().norm().cpu()[None], change])


def compare(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """EckartWarnings that name the layers whose base, or whose adapter, is not what was saved."""
    base, adapter = {}, {}
    for name, found in now.items():
        if (kept := saved.get(name)) is None or kept.shape != found.shape:
            continue
        kept = kept.double().cpu()
        norm = float(kept[PROBES])
        if not norm > 0:  # nothing was recorded
            continue
        off = kept - found
        base[name] = math.sqrt(float(off[:PROBES].square().mean())) / norm
        scale = float(kept[PROBES + 1 :].square().mean()) ** 0.5
        adapter[name] = math.sqrt(float(off[PROBES + 1 :].square().mean())) / max(scale, 1e-6 * norm)
    _warn(base, TOLERANCE, "this adapter was trained on another base model", "their weights are off")
    _warn(adapter, 1e-3, "this adapter is not the one that was saved", "its change of the weight is off")


def _warn(off: Mapping[str, float], tolerance: float, what: str, how: str) -> None:
    wrong = {name: value for name, value in off.items() if not value <= tolerance}
    if not wrong:
        return
    shown = sorted(wrong, key=lambda name: -wrong[name])
    listed = ", ".join(f"{name} (about {wrong[name]:.0%})" for name in shown[:5]) + (" …" if len(shown) > 5 else "")
    warnings.warn(
        f"{what}: {len(wrong)} of {len(off)} layers differ; {how}: {listed}. Its outputs are not what they were.",
        EckartWarning,
        stacklevel=2,
    )
