"""Guards: what an update passes through before it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from eckart.optim.layout import Layout, mean_square
from eckart.optim.parts import knob, number_fault
from eckart.optim.residuals import limit_growth


class Guard(Protocol):
    limited: ClassVar[bool]
    """Whether it remembers the size of its last update."""

    def passed(
        self, U: Tensor, G: Tensor, W: Tensor, last: Tensor | None, rows: int, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """The update (batch, d, k), and a factor (batch, 1, 1) on the weight decay, or None.

        G is the gradient, W the weight; ``rows`` is the dimension of the outputs, −2 or −1. Writes into U and last.
        """
        ...

    def faults(self) -> list[str]: ...


@dataclass(frozen=True)
class Radial:
    """The update without its part along the weight, where gradient and weight are nearly orthogonal (AdamP, SGDP).

    That is the mark of weights before a normalisation. Per output channel if max |cos(g, w)| < δ/√n over the channels
    of n inputs; else per matrix by the same test of all its entries. Where it applies, weight decay is times ``ratio``.
    """

    delta: float = knob(0.1, "radial_delta")
    ratio: float = knob(0.1, "radial_ratio")
    limited: ClassVar[bool] = False

    def passed(
        self, U: Tensor, G: Tensor, W: Tensor, last: Tensor | None, rows: int, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        across = -1 if rows == -2 else -2
        by_channel, channel = _without_radial(U, G, W, (across,), self.delta, layout)
        by_matrix, matrix = _without_radial(U, G, W, (-2, -1), self.delta, layout)
        out = torch.where(channel, by_channel, torch.where(matrix, by_matrix, U))
        return out, torch.where(channel | matrix, self.ratio, 1.0)

    def faults(self) -> list[str]:
        return number_fault("radial_delta", self.delta, 0) + number_fault("radial_ratio", self.ratio, 0)


@dataclass(frozen=True)
class Clip:
    """Entries clipped to ±τ, the quantile of their magnitudes in the matrix: coordinate-wise clipping."""

    quantile: float = knob(0.9, "clip_quantile")
    limited: ClassVar[bool] = False

    def passed(
        self, U: Tensor, G: Tensor, W: Tensor, last: Tensor | None, rows: int, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        return layout.whole(U, self._clipped), None

    def _clipped(self, U: Tensor) -> Tensor:
        entries = U.abs().flatten(1)
        place = min(entries.shape[1], max(1, math.ceil(self.quantile * entries.shape[1])))
        bound = entries.kthvalue(place, dim=1).values[:, None, None]
        return torch.minimum(torch.maximum(U, -bound), bound)

    def faults(self) -> list[str]:
        return number_fault("clip_quantile", self.quantile, 0, 1)


@dataclass(frozen=True)
class Growth:
    """‖U‖_F at most ``limit`` times what it was at the last step."""

    limit: float = knob(1.01, "growth_limit")
    limited: ClassVar[bool] = True

    def passed(
        self, U: Tensor, G: Tensor, W: Tensor, last: Tensor | None, rows: int, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        assert last is not None
        limit_growth(U, last, self.limit, layout)
        return U, None

    def faults(self) -> list[str]:
        return number_fault("growth_limit", self.limit, 1)


@dataclass(frozen=True)
class Rms:
    """The update scaled to the root mean square ``target`` over its entries; zero stays zero."""

    target: float = knob(0.2, "rms_target")
    limited: ClassVar[bool] = False

    def passed(
        self, U: Tensor, G: Tensor, W: Tensor, last: Tensor | None, rows: int, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        size = mean_square(U, layout).sqrt_().clamp_min_(torch.finfo(U.dtype).tiny)
        return U.mul_(self.target / size), None

    def faults(self) -> list[str]:
        return number_fault("rms_target", self.target, 0)


def _without_radial(
    U: Tensor, G: Tensor, W: Tensor, dims: tuple[int, ...], delta: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """U − ŵ ⟨ŵ, U⟩ over ``dims``, and whether |cos(g, w)| < δ/√(their size) for all (batch, 1, 1)."""

    def summed(X: Tensor) -> Tensor:
        partial = X.sum(dims, keepdim=True)
        return layout.along(partial) if -1 in dims else partial

    eps = 1e-8
    count = math.prod(layout.length(U.shape[dim]) if dim == -1 else U.shape[dim] for dim in dims)
    w = summed(W.square()).sqrt_()
    g = summed(G.square()).sqrt_()
    cosine = summed(G * W).abs() / ((w + eps) * (g + eps))
    flat = layout.peak(_largest(cosine)) < delta / math.sqrt(count)
    unit = W / (w + eps)
    return U - unit * summed(unit * U), flat


def _largest(X: Tensor) -> Tensor:
    """(batch, 1, 1) of magnitudes; 0 where there are none."""
    return X.amax((-2, -1), keepdim=True) if X.shape[-1] else X.new_zeros(len(X), 1, 1)


GUARDS: dict[str, type] = {"radial": Radial, "clip": Clip, "growth": Growth, "rms": Rms}
"""By the names that ``guards=`` takes."""
