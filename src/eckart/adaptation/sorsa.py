r"""SORSA: train the principal triplets of the weight and keep their vectors orthonormal.

*What it does.* As PiSSA, but with the singular values apart and the two sets of vectors held near, or on, the
orthonormal ones, so that directions stay well conditioned.

*Formula.* U₀ S₀ V₀ᵀ = SVD_r(W); ΔW = U diag(S) Vᵀ − U₀ diag(S₀) V₀ᵀ, with U, S, V trained. ``orthonormal="penalty"``
adds γ ½ (‖UᵀU − I‖_F + ‖VᵀV − I‖_F) per slice, averaged over the layer's slices, to the loss (norms, not squares).
``"exact"`` trains X with U = X L⁻ᵀ, XᵀX = L Lᵀ (Cholesky), and the same for V, which are orthonormal whatever X is, and
needs no γ.

*Cost.* As PiSSA with r more numbers. The penalty: r² (out + in) multiply-adds a step; exact vectors twice that in
every forward pass.

*When it does not help.* The penalty is on ``eckart.hf.adapters.tuner.penalty(model)``, and a trainer that does not add
it trains a PiSSA with an extra factor. At the official γ it moves little. Exact vectors cannot change W's core matrix
UᵀWV off the diagonal without turning. In the claim the training loss after 60 steps was 1.752 nats per byte (exact
1.753, LoRA 1.755, PiSSA 1.749) and the held-out loss that of LoRA, 1.848.

*Departs from the paper in.* The official trainer adds (γ/lr) times the gradient of the penalty after clipping and
before Adam, which is the paper's separate step only under SGD; here the penalty is a term of the loss, so γ is not
divided by the learning rate. Nothing is formed at full size: the official code multiplies (U S) Vᵀ out in every forward
pass. The start is subtracted rather than taken out of W (see :mod:`eckart.adaptation.method`). Exact vectors come from
a parametrisation: putting U and V back to the nearest orthonormal matrices after a step of Adam is no descent, as
Adam's step does not lie along the gradient; on the claim's problem it raised the loss.

*Reference.* Y. Cao, “SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
Models”, 2024, https://arxiv.org/abs/2409.00055.

*Example.*

>>> import torch
>>> layout = Layout(name="up", kind="linear", out_features=8, in_features=6)
>>> weight = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0))
>>> delta = SorsaDelta(layout, 3, Options(orthonormal="exact"))
>>> delta.start(Source(layout=layout, weight=weight))
>>> delta.fill(U=delta.U + 0.1)
>>> U = delta.vectors()[0]
>>> bool(torch.allclose(U.mT @ U, torch.eye(3), atol=1e-5))
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.adaptation.lora import METHOD as LORA
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source, difference
from eckart.adaptation.trial import means
from eckart.errors import InputError, problems
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the vectors are kept orthonormal."""

    orthonormal: Literal["penalty", "exact"] = "penalty"
    """``penalty``: nearly, by a term of the loss; ``exact``: by what is trained."""
    gamma: float = 4e-4
    """Weight of the penalty, at least 0."""

    def __post_init__(self) -> None:
        wrong = []
        if self.orthonormal not in ("penalty", "exact"):
            wrong.append(f"orthonormal is 'penalty' or 'exact'; got {self.orthonormal!r}")
        if not 0 <= self.gamma < math.inf:
            wrong.append(f"gamma is a number of at least 0; got {self.gamma!r}")
        if wrong:
            raise InputError(problems("method 'sorsa'", wrong))


class SorsaDelta(Delta):
    """ΔW = U diag(S) Vᵀ − U₀ diag(S₀) V₀ᵀ, with ``Vh`` = Vᵀ."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    B0: Tensor
    A0: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        s, m, n = layout.slices, layout.out_features, layout.in_features
        self.trained("U", s, m, rank)
        self.trained("S", s, rank)
        self.trained("Vh", s, rank, n)
        self.fixed("B0", s, m, rank)
        self.fixed("A0", s, rank, n)

    def start(self, source: Source) -> None:
        U, S, Vh = source.leading(self.rank)
        self.fill(U=U, S=S, Vh=Vh)
        with torch.no_grad():  # the start as it is computed later on, so that the difference is zero
            U, Vh = self.vectors()
            self.fill(B0=U * self.S[:, None, :], A0=Vh)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """U (slices, out, r) and Vᵀ (slices, r, in)."""
        if self.options.orthonormal == "penalty":
            return self.U, self.Vh
        return _orthonormal(self.U), _orthonormal(self.Vh.mT).mT

    def factors(self) -> tuple[Tensor, Tensor]:
        U, Vh = self.vectors()
        return difference(U * self.S[:, None, :], Vh, self.B0, self.A0)

    def penalty(self) -> Tensor | None:
        if self.options.orthonormal != "penalty" or self.options.gamma == 0:
            return None
        deviation: Tensor = self.options.gamma * 0.5 * (_off(self.U.mT @ self.U) + _off(self.Vh @ self.Vh.mT)).mean()
        return deviation


def _off(gram: Tensor) -> Tensor:
    """‖G − I‖_F of each matrix of a batch; its gradient at 0 is 0 rather than NaN."""
    squares = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum((-2, -1))
    return torch.where(squares > 0, squares.clamp(min=torch.finfo(gram.dtype).tiny).sqrt(), 0.0)


def _orthonormal(X: Tensor) -> Tensor:
    """X L⁻ᵀ with XᵀX = L Lᵀ: orthonormal columns that span those of X (…, m, k), m ≥ k. Differentiable."""
    L = torch.linalg.cholesky(X.mT @ X)
    columns: Tensor = torch.linalg.solve_triangular(L, X.mT, upper=False).mT
    return columns


def _run_claim() -> Verdict:
    ours, lora = means(METHOD, rank=8, steps=60), means(LORA, rank=8, steps=60)
    exact = means(METHOD, rank=8, steps=60, options=Options(orthonormal="exact"))
    return Verdict(
        held=ours.train < lora.train,
        figures=ours.figures("SORSA") | exact.figures("SORSA, exact") | lora.figures("LoRA"),
        note="nats per byte after 60 steps; best learning rate by training loss, mean of 3 seeds",
    )


METHOD = AdaptMethod(
    name="sorsa",
    summary="principal singular triplets, their vectors kept orthonormal by a penalty or exactly",
    paper=Paper(
        authors="Y. Cao",
        title="SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        year=2024,
        link="https://arxiv.org/abs/2409.00055",
    ),
    options=Options,
    delta=SorsaDelta,
    exact=True,
    claim=Claim(
        statement="After the same 60 steps at rank 8 the training loss is lower than LoRA's, in the mean of 3 seeds.",
        source="abstract and figures: faster convergence than LoRA",
        run=_run_claim,
    ),
)
