"""What an optimizer does to each matrix, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from eckart.optim.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One matrix, or a stack of them (then means over the stack)."""

    name: str
    """Of the parameter where groups name them, else ``group.position``; of a piece of it with ``.0``, ``.1``, …"""
    rows: int
    columns: int
    rank: int
    """Of the subspace; the whole side where there is none."""
    steps: int
    captured: float | None
    """‖Qᵀ X‖² / ‖X‖² of the gradient with its feedback, 0 … 1 for orthonormal Q; None without a gradient."""
    feedback: float | None
    """‖E‖ of what waits for later steps; None without error feedback."""
    update: float | None
    """Root mean square of lr · scale · Δ; None without a gradient."""
    top: float
    """Largest singular value of the weight, by power steps: from below, to about a percent."""


@dataclass(frozen=True)
class Report:
    """Layers in the order of the parameters. Prints as a table; ``rows()`` are plain data."""

    layers: tuple[LayerReport, ...]

    def rows(self) -> list[dict[str, Any]]:
        return [{f.name: getattr(layer, f.name) for f in fields(layer)} for layer in self.layers]

    def __str__(self) -> str:
        titles = ("matrix", "rows", "columns", "rank", "steps", "captured", "feedback", "update rms", "top σ of W")
        table = [titles, *(tuple(_cell(value) for value in row.values()) for row in self.rows())]
        widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
        return "\n".join(lines)


def name_in(group: Mapping[str, Any], place: int, position: int) -> str:
    """The name of a parameter, by its group's ``param_names`` where there are such."""
    names = group.get("param_names")
    return str(names[position]) if names else f"{place}.{position}"


def top_singular_value(W: Tensor, layout: Layout, *, steps: int = 20) -> float:
    """The mean over the stack W (batch, d, k) of the largest singular value, from below, by power steps on W Wᵀ."""
    generator = torch.Generator(device=W.device).manual_seed(0)
    v = torch.randn(len(W), W.shape[1], 1, generator=generator, dtype=W.dtype, device=W.device)
    size = torch.ones_like(v[:, :1])
    for _ in range(steps):
        v = layout.along(W @ (W.mT @ (v / size)))
        size = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(torch.finfo(W.dtype).tiny)
    return layout.mean(size.sqrt())


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
