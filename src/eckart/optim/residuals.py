"""What becomes of the part of the gradient that lies outside of the subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from eckart.optim.layout import Layout, channel_norms, frobenius
from eckart.optim.parts import knob, number_fault
from eckart.optim.subspaces import Basis

TINY = 1e-8
"""Added to norms that are divided by, as the released code of Fira and APOLLO does."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A step in a subspace, before what lies outside is seen to."""

    X: Tensor
    """(batch, d, k)."""
    inside: Tensor | None
    """Q Qᵀ X, for residuals with ``needs_inside``."""
    basis: Basis
    low: Tensor
    """Qᵀ X (batch, r, k)."""
    U: Tensor
    """What the rule made of that."""


class Residual(Protocol):
    limited: ClassVar[bool]
    """Whether it remembers the size of its last update."""
    needs_inside: ClassVar[bool]

    def update(self, seen: Seen, last: Tensor | None, layout: Layout) -> Tensor:
        """The update (batch, d, k), a new tensor.

        ``last`` (batch, 1, 1) is the size of the last residual, 0 before there is one; it is overwritten.
        """
        ...

    def faults(self) -> list[str]: ...


@dataclass(frozen=True)
class Drop:
    """Q U alone."""

    limited: ClassVar[bool] = False
    needs_inside: ClassVar[bool] = False

    def update(self, seen: Seen, last: Tensor | None, layout: Layout) -> Tensor:
        return seen.basis.up(seen.U)

    def faults(self) -> list[str]:
        return []


@dataclass(frozen=True)
class SignResidual:
    """Q U + s · sign(X − Q Qᵀ X): sign descent on the rest (FRUGAL), without state."""

    scale: float = knob(1.0, "residual_scale")
    limited: ClassVar[bool] = False
    needs_inside: ClassVar[bool] = True

    def update(self, seen: Seen, last: Tensor | None, layout: Layout) -> Tensor:
        assert seen.inside is not None
        return seen.basis.up(seen.U).add_((seen.X - seen.inside).sign_(), alpha=self.scale)

    def faults(self) -> list[str]:
        return number_fault("residual_scale", self.scale, 0)


@dataclass(frozen=True)
class ScaledResidual:
    """Q U + φ (X − Q Qᵀ X), each channel of k scaled by φ = ‖u‖ / ‖Qᵀ x‖ as the rule scaled it (Fira).

    The Frobenius norm of the second term grows by at most the factor ``growth`` a step; 0: without limit.
    """

    growth: float = knob(1.01, "residual_growth")
    limited: ClassVar[bool] = True
    needs_inside: ClassVar[bool] = True

    def update(self, seen: Seen, last: Tensor | None, layout: Layout) -> Tensor:
        assert seen.inside is not None
        rest = (seen.X - seen.inside).mul_(channel_norms(seen.U) / (channel_norms(seen.low) + TINY))
        if self.growth and last is not None:
            limit_growth(rest, last, self.growth, layout)
        return seen.basis.up(seen.U).add_(rest)

    def faults(self) -> list[str]:
        return number_fault("residual_growth", self.growth, 0)


@dataclass(frozen=True)
class ChannelResidual:
    """X itself, each channel of k (or the whole matrix) scaled by ‖u‖ / ‖Qᵀ x‖ as the rule scaled it (APOLLO)."""

    per: Literal["channel", "tensor"] = knob("channel", "residual_per")
    limited: ClassVar[bool] = False
    needs_inside: ClassVar[bool] = False

    def update(self, seen: Seen, last: Tensor | None, layout: Layout) -> Tensor:
        if self.per == "channel":
            return seen.X * (channel_norms(seen.U) / (channel_norms(seen.low) + TINY))
        return seen.X * (frobenius(seen.U, layout) / (frobenius(seen.low, layout) + TINY))

    def faults(self) -> list[str]:
        wrong = self.per not in ("channel", "tensor")
        return [f"residual_per is 'channel' or 'tensor'; got {self.per!r}"] if wrong else []


def limit_growth(U: Tensor, last: Tensor, growth: float, layout: Layout) -> None:
    """Scales U in place such that ‖U‖ ≤ growth · last, without a limit where last is 0; last ← ‖U‖."""
    norm = frobenius(U, layout)
    allowed = torch.where(last > 0, last * growth, norm)
    factor = torch.where(norm > allowed, allowed / norm.clamp_min(torch.finfo(U.dtype).tiny), 1.0)
    U.mul_(factor)
    last.copy_(norm * factor)


RESIDUALS: dict[str, type] = {
    "drop": Drop,
    "sign": SignResidual,
    "scaled": ScaledResidual,
    "channel": ChannelResidual,
}
"""By the names that ``residual=`` takes."""
