"""Fewer neurons in an MLP, and the rest of its second map refitted to what they compute.

The neurons J that stay feed W₂′ = W₂ Σ_{:J} Σ_JJ⁻¹, the least-squares fit of W₂ h on h_J, whose error
tr(G (W₂ − W₂′) Σ (W₂ − W₂′)ᵀ) has a closed form for every prefix of an order at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.arch import MLP
from eckart.modules.method import Piece
from eckart.records import Unit

DAMPING = 1e-6
"""Added to the diagonal of Σ, in multiples of its mean: inputs of dead neurons make Σ singular."""
ROUNDS = 128
"""Neurons are removed in about so many rounds, each with new scores; one at a time gains nothing that shows."""
PANEL = 8
"""Rounds between two updates of all of Σ⁻¹."""


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
    refit: bool = True
    """Whether W₂ is fitted to the neurons that stay, or keeps their columns and its bias."""
    _fits: dict[int, Tensor] = field(init=False, repr=False, default_factory=dict)

    def _kept(self, width: int) -> Tensor:
        return self.order[:width].sort().values

    def _refitted(self, width: int) -> Tensor:
        """W₂′ (out, width). The last one is kept: probes, errors and the cut ask for the same width."""
        if width not in self._fits:
            weight, kept = self.weights[self.mlp.down]["weight"], self._kept(width)
            self._fits.clear()
            self._fits[width] = (
                refitted_columns(weight, self.second, kept) if self.refit else weight[:, kept].to("cpu", torch.float64)
            )
        return self._fits[width]

    def _bias(self, width: int) -> Tensor | None:
        down = self.weights[self.mlp.down]
        if not self.refit:
            return _exact(down.get("bias"))
        return bias_with_mean(down, self.mean, self._kept(width), lambda: self._refitted(width))

    def cut(self, width: int) -> tuple[Piece, ...]:
        kept = self._kept(width)
        pieces = []
        for rows in self.mlp.inputs:
            map_ = self.weights[rows.site]
            bias = map_["bias"][rows.start : rows.stop][kept] if "bias" in map_ else None
            weight = map_["weight"][rows.start : rows.stop][kept]
            pieces.append(_piece(rows.site, weight, bias, rows.start, rows.stop))
        new, inside = self._refitted(width), self.second[kept][:, kept]
        pieces.append(Piece(site=self.mlp.down, side="columns", weight=new, bias=self._bias(width), second=inside))
        return tuple(pieces)

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        dense = torch.zeros_like(self.weights[self.mlp.down]["weight"], dtype=torch.float64, device="cpu")
        dense[:, self._kept(width)] = self._refitted(width)
        return self.mlp.down, dense, self._bias(width)


def refitted_columns(weight: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """W′ = W Σ_{:J} Σ_JJ⁻¹ (m, kept), float64: the least-squares fit of W x on the inputs J that stay."""
    weight = weight.to("cpu", torch.float64)
    added = floor(second)  # on both sides: all inputs then give back W, whatever Σ is
    inside = second[kept][:, kept]
    inside.diagonal().add_(added)
    moved = weight @ second[:, kept] + added * weight[:, kept]
    fitted: Tensor = torch.cholesky_solve(moved.T, torch.linalg.cholesky(inside)).T
    return fitted


def bias_with_mean(
    map_: Mapping[str, Tensor], mean: Tensor | None, kept: Tensor, refitted: Callable[[], Tensor]
) -> Tensor | None:
    """The bias of a map whose inputs ``kept`` stay, which takes up what the mean loses; None without one."""
    bias = _exact(map_.get("bias"))
    if bias is None or mean is None:
        return bias
    return bias + map_["weight"].to("cpu", torch.float64) @ mean - refitted() @ mean[kept]


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", torch.float64)


def _piece(site: str, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Piece:
    return Piece(
        site=site, side="rows", weight=weight.to("cpu", torch.float64), bias=_exact(bias), start=start, stop=stop
    )


def floor(second: Tensor) -> Tensor:
    """λ."""
    return DAMPING * second.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)


def damped(second: Tensor) -> Tensor:
    """Σ + λI."""
    found = second.clone()
    found.diagonal().add_(floor(second))
    return found


def removal_order(target: Tensor, second: Tensor) -> Tensor:
    """Neurons in the order of their usefulness (n,), by optimal brain surgery; ``target`` is R W₂ (m, n), G = RᵀR.

    Without neuron i, refitted, the objective rises by ‖target_i‖² / [Σ⁻¹]_ii. The least useful go first, a round
    at a time; their part moves to the others: target ← target − target_B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B:, and
    Σ⁻¹ ← Σ⁻¹ − [Σ⁻¹]_:B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B:. Scores need the diagonal of Σ⁻¹ only, so its other entries are
    brought up to date once in PANEL rounds, in one product. Cost: O(n³ + m n²).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    columns = target.T.clone(memory_format=torch.contiguous_format)  # (n, m)
    left = torch.arange(len(second))
    size = max(1, len(second) // ROUNDS)
    removed: list[Tensor] = []
    while len(left):
        panel = min(PANEL * size, len(left))
        rows = inverse.new_empty(panel, len(left))  # those of a Cholesky factor of Σ⁻¹
        diagonal = inverse.diagonal().clone()
        stays = torch.ones(len(left), dtype=torch.bool)
        for done in range(0, panel, size):
            scores = (columns.square().sum(1) / diagonal).masked_fill(~stays, torch.inf)
            gone = scores.argsort(stable=True)[: min(size, panel - done)]
            block = inverse[gone] - rows[:done, gone].T @ rows[:done]
            root = torch.linalg.cholesky(block[:, gone])
            part = torch.linalg.solve_triangular(root, columns[gone], upper=False)
            new = rows[done : done + len(gone)] = torch.linalg.solve_triangular(root, block, upper=False)
            columns.addmm_(new.T, part, alpha=-1.0)
            diagonal -= new.square().sum(0)
            stays[gone] = False
            removed.append(left[gone])
        rows = rows[:, stays]
        inverse = inverse[stays][:, stays].addmm_(rows.T, rows, alpha=-1.0)
        columns, left = columns[stays], left[stays]
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


def errors_without_refit(target: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """(n + 1,): the objective at width 0 … n where the others are cut out and nothing else changes.

    With M = (TᵀT) ∘ Σ in that order, the sum of its entries from k on in both directions.
    """
    ordered = ((target.T @ target) * second)[order][:, order]
    sums = ordered.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums.clamp(min=0.0), sums.new_zeros(1)])
