"""Rules: from the gradient in the subspace and its moments to the direction of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from eckart.linalg import newton_schulz, product_dtype
from eckart.linalg.polar import QUINTIC
from eckart.optim.layout import Layout, frobenius, mean_square, square_sums
from eckart.optim.parts import knob, number_fault


class Rule(Protocol):
    """``moments``: names of what it keeps, each of the shape of the gradient. ``unsigned``: those never negative."""

    @property
    def moments(self) -> tuple[str, ...]: ...

    @property
    def unsigned(self) -> tuple[str, ...]: ...

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The direction (batch, r, k), a new tensor; W ← W − lr · scale · direction.

        Writes into the moments and leaves G as it is. ``t`` counts steps of the moments from 1; ``dtype`` is that of
        matrix products.
        """
        ...

    def faults(self) -> list[str]: ...


def _betas_faults(betas: Any, eps: Any) -> list[str]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return [f"betas are two numbers; got {betas!r}"]
    found = [f for i, beta in enumerate(betas) for f in number_fault(f"betas[{i}]", beta, 0, 1, open_high=True)]
    return found + number_fault("eps", eps, 0)


def _momentum(G: Tensor, moments: Mapping[str, Tensor], momentum: float, nesterov: bool) -> Tensor:
    """M ← μM + G, and G + μM (Nesterov) or M itself."""
    if momentum == 0:
        return G
    M = moments["momentum"].mul_(momentum).add_(G)
    return torch.add(G, M, alpha=momentum) if nesterov else M


def adam_direction(G: Tensor, m: Tensor, v: Tensor, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """m ← β₁m + (1 − β₁)G, v ← β₂v + (1 − β₂)G²; m̂ / (√v̂ + ε)."""
    beta1, beta2 = betas
    contiguous = G.is_contiguous() and m.is_contiguous() and v.is_contiguous()
    if G.device.type == "cpu" and contiguous and not torch.compiler.is_compiling():
        # torch's fused kernel, one pass over memory: a step of rate −1 from zero is the direction.
        U = torch.zeros_like(G)
        adam(
            [U], [G], [m], [v], [], [torch.tensor(float(t - 1))], foreach=False, fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=-1.0, weight_decay=0.0, eps=eps, maximize=False,
        )  # fmt: skip
        return U
    m.lerp_(G, 1 - beta1)
    v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
    root = v.sqrt().mul_((1 - beta2**t) ** -0.5).add_(eps)
    return torch.div(m, root, out=root).div_(1 - beta1**t)


@dataclass(frozen=True)
class Adam:
    """Adam without weight decay: m̂ / (√v̂ + ε). Moments m and v."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    unsigned: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        return adam_direction(G, moments["exp_avg"], moments["exp_avg_sq"], t, self.betas, self.eps)

    def faults(self) -> list[str]:
        return _betas_faults(self.betas, self.eps)


@dataclass(frozen=True)
class DiffGradRule:
    """Adam slowed where the gradient changes little: times ξ = σ(|G_{t−1} − G_t|) in [½, 1), with G_0 = 0.

    Keeps m, v and the last gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "previous")
    unsigned: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        U = adam_direction(G, moments["exp_avg"], moments["exp_avg_sq"], t, self.betas, self.eps)
        U.mul_(moments["previous"].sub_(G).abs_().sigmoid_())
        moments["previous"].copy_(G)
        return U

    def faults(self) -> list[str]:
        return _betas_faults(self.betas, self.eps)


@dataclass(frozen=True)
class Momentum:
    """M ← μM + G; the direction is M, or G + μM with ``nesterov``. Momentum 0 is the gradient itself."""

    momentum: float = 0.9
    nesterov: bool = False
    unsigned: ClassVar[tuple[str, ...]] = ()

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        return _momentum(G, moments, self.momentum, self.nesterov).clone()

    def faults(self) -> list[str]:
        return number_fault("momentum", self.momentum, 0, 1, open_high=True)


@dataclass(frozen=True)
class Sign(Momentum):
    """The signs of the momentum."""

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        return _momentum(G, moments, self.momentum, self.nesterov).sign()


@dataclass(frozen=True)
class Normalize(Momentum):
    """The momentum over its Frobenius norm; zero stays zero."""

    momentum: float = 0.95
    nesterov: bool = True

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        M = _momentum(G, moments, self.momentum, self.nesterov)
        return M / frobenius(M, layout).clamp_min_(torch.finfo(M.dtype).tiny)


@dataclass(frozen=True)
class UnitRows(Momentum):
    """Each direction's row of the momentum over its norm (Dion, in the subspace); zero stays zero."""

    momentum: float = 0.0

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        M = _momentum(G, moments, self.momentum, self.nesterov)
        return M / square_sums(M, layout).sqrt_().clamp_min_(torch.finfo(M.dtype).tiny).unsqueeze(-1)


@dataclass(frozen=True)
class NewtonSchulz(Momentum):
    """The momentum made nearly orthogonal (Muon): singular values near 1, singular vectors kept.

    ``steps``, ``coefficients`` and ``gram`` are those of ``eckart.linalg.newton_schulz``.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = knob(5, "ns_steps")
    coefficients: tuple[float, float, float] = knob(QUINTIC, "ns_coefficients")
    gram: Literal["auto"] | bool = knob("auto", "ns_gram")

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        return self.orthogonal(_momentum(G, moments, self.momentum, self.nesterov), layout, dtype)

    def orthogonal(self, M: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        def orthogonal(whole: Tensor) -> Tensor:
            return newton_schulz(whole, steps=self.steps, coefficients=self.coefficients, gram=self.gram, dtype=dtype)

        return layout.whole(M, orthogonal)

    def faults(self) -> list[str]:
        return super().faults() + number_fault("ns_steps", self.steps, 0)


@dataclass(frozen=True)
class AuONRule(Momentum):
    """X / rms(cosh(γX)) of X = M / ‖M‖_F: within (γ²/2)/entries of :class:`Normalize`."""

    momentum: float = 0.95
    nesterov: bool = True
    gamma: float = 1.5

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        M = _momentum(G, moments, self.momentum, self.nesterov)
        return _braked(M / frobenius(M, layout).clamp_min_(torch.finfo(M.dtype).tiny), self.gamma, layout)

    def faults(self) -> list[str]:
        return super().faults() + number_fault("gamma", self.gamma, 0)


@dataclass(frozen=True)
class Hybrid(NewtonSchulz):
    """:class:`NewtonSchulz` of one step, then the brake of :class:`AuONRule`."""

    steps: int = knob(1, "ns_steps")
    gamma: float = 1.5

    def direction(self, G: Tensor, moments: Mapping[str, Tensor], t: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        X = self.orthogonal(_momentum(G, moments, self.momentum, self.nesterov), layout, dtype)
        return _braked(X, self.gamma, layout)

    def faults(self) -> list[str]:
        return super().faults() + number_fault("gamma", self.gamma, 0)


def _braked(X: Tensor, gamma: float, layout: Layout) -> Tensor:
    # cosh overflows from about 89 on in float32; the entries of X are at most about 1.
    return X / mean_square(torch.cosh(X * gamma), layout).sqrt_()


def work_of(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for parameters of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_of(compute: str | None, work: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: that of the work, or halves where the device has products of them."""
    if compute is None or work == torch.float64:
        return work
    return product_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[compute], device)


RULES: dict[str, type] = {
    "adam": Adam,
    "momentum": Momentum,
    "newton_schulz": NewtonSchulz,
    "normalize": Normalize,
    "unit_rows": UnitRows,
    "auon": AuONRule,
    "hybrid": Hybrid,
    "sign": Sign,
    "diffgrad": DiffGradRule,
}
"""By the names that ``rule=`` takes."""
