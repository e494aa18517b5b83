"""Fewer neurons in an MLP, and the rest of its second map refitted to what they compute.

The neurons J that stay feed W₂′ = W₂ Σ_{:J} Σ_JJ⁻¹, the least-squares fit of W₂ h on h_J, whose error
tr(G (W₂ − W₂′) Σ (W₂ − W₂′)ᵀ) has a closed form for every prefix of an order at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.arch import MLP
from eckart.modules.method import Piece
from eckart.records import Unit

DAMPING = 1e-6
"""Added to the diagonal of Σ, in multiples of its mean: inputs of dead neurons make Σ singular."""
ROUNDS = 128
"""Neurons are removed in about so many rounds, each with new scores; one at a time gains nothing that shows."""


@dataclass(frozen=True, eq=False)
class PreparedNeurons:
    """Neurons in the order in which they are kept, and the loss at every width."""

    unit: Unit
    mlp: MLP
    weights: Mapping[str, Mapping[str, Tensor]]
    second: Tensor
    mean: Tensor | None
    order: Tensor
    """(width,): the most useful neuron first."""
    errors: Tensor

    def _kept(self, width: int) -> Tensor:
        return self.order[:width].sort().values

    def _refitted(self, kept: Tensor) -> Tensor:
        down = self.weights[self.mlp.down]["weight"].to("cpu", torch.float64)
        second = damped(self.second)  # on both sides: full width then gives back W₂, whatever Σ is
        inside, moved = second[kept][:, kept], down @ second[:, kept]
        refitted: Tensor = torch.cholesky_solve(moved.T, torch.linalg.cholesky(inside)).T
        return refitted

    def cut(self, width: int) -> tuple[Piece, ...]:
        kept = self._kept(width)
        pieces = []
        for rows in self.mlp.inputs:
            map_ = self.weights[rows.site]
            bias = map_["bias"][rows.start : rows.stop][kept] if "bias" in map_ else None
            weight = map_["weight"][rows.start : rows.stop][kept]
            pieces.append(_piece(rows.site, weight, bias, rows.start, rows.stop))
        down, new = self.weights[self.mlp.down], self._refitted(kept)
        bias = down.get("bias")
        if bias is not None and self.mean is not None:
            lost = down["weight"].to("cpu", torch.float64) @ self.mean - new @ self.mean[kept]
            bias = bias.to("cpu", torch.float64) + lost
        inside = self.second[kept][:, kept]
        pieces.append(Piece(site=self.mlp.down, side="columns", weight=new, bias=_exact(bias), second=inside))
        return tuple(pieces)

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        kept = self._kept(width)
        dense = torch.zeros_like(self.weights[self.mlp.down]["weight"], dtype=torch.float64, device="cpu")
        dense[:, kept] = self._refitted(kept)
        return self.mlp.down, dense, self.cut(width)[-1].bias


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", torch.float64)


def _piece(site: str, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Piece:
    return Piece(
        site=site, side="rows", weight=weight.to("cpu", torch.float64), bias=_exact(bias), start=start, stop=stop
    )


def damped(second: Tensor) -> Tensor:
    """Σ + λI."""
    floor = DAMPING * second.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return second + floor * torch.eye(len(second), dtype=second.dtype)


def removal_order(target: Tensor, second: Tensor) -> Tensor:
    """Neurons in the order of their usefulness (n,), by optimal brain surgery; ``target`` is R W₂ (m, n), G = RᵀR.

    Without neuron i, refitted, the objective rises by ‖target_i‖² / [Σ⁻¹]_ii. The least useful go first, a round
    at a time; their part moves to the others: target ← target − target_B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B:, and
    Σ⁻¹ ← Σ⁻¹ − [Σ⁻¹]_:B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B:. Cost: O(n³ + m n²).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    left = torch.arange(len(second))
    removed: list[Tensor] = []
    size = max(1, len(second) // ROUNDS)
    while len(left):
        scores = target.square().sum(0) / inverse.diagonal()
        gone = scores.argsort(stable=True)[:size]
        removed.append(left[gone])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        root = torch.linalg.cholesky(inverse[gone][:, gone])
        part = torch.linalg.solve_triangular(root, target[:, gone].T, upper=False)
        rows = torch.linalg.solve_triangular(root, inverse[gone][:, stays], upper=False)
        target = target[:, stays] - part.T @ rows
        inverse = inverse[stays][:, stays] - rows.T @ rows
        left = left[stays]
    return torch.cat(removed).flip(0)


def leverage_order(second: Tensor, ridge: float) -> Tensor:
    """Neurons (n,) by falling ridge leverage [Σ (Σ + λI)⁻¹]_ii, λ in multiples of the mean of the diagonal."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=0.0)
    shares: Tensor = values / (values + ridge * second.diagonal().mean())
    leverage: Tensor = vectors.square() @ shares
    order: Tensor = leverage.argsort(descending=True, stable=True)
    return order


def errors_in_order(target: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """(n + 1,): the objective at width 0 … n where the first neurons of ``order`` stay and W₂ is refitted.

    With Σ in that order = L Lᵀ, what a prefix of k neurons explains is the first k columns of target · L: one
    Cholesky factorisation for every width.
    """
    root = torch.linalg.cholesky(damped(second)[order][:, order])
    energies: Tensor = (target[:, order] @ root).square().sum(0)
    errors: Tensor = energies.new_zeros(len(energies) + 1)
    errors[:-1] = energies.flip(0).cumsum(0).flip(0)
    return errors
