r"""SGDP: momentum descent without the part of its steps that only lengthens the weights.

*What it does.* As :class:`AdamP`, with plain momentum in the place of Adam's direction.

*Formula.* M ← μ M + G, u = M or G + μ M (Nesterov); if |cos(g, w)| < δ/√n for all output channels w of n inputs:
u ← u − ŵ ⟨ŵ, u⟩ per channel; else by the same test of the whole matrix on the whole matrix;
W ← W − η λ ρ W − η u, with ρ = 0.1 where it was projected and 1 elsewhere.

*Cost.* State: one momentum. A step: some ten passes more over weights and gradients than momentum descent.

*When it does not help.* Where no weights are scale-invariant, as without normalisation; see :class:`AdamP`.

*Departs from the paper in.* The decay is λ as given; the released code divides it by 1 − μ, so give it ``weight_decay
/ (1 - momentum)`` for its numbers. No dampening. Vectors are trained by AdamW, as in all of this room, at ``lr ·
vector_scale``.

*Reference.* B. Heo, S. Chun, S. J. Oh and others, “AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights”, 2021, https://arxiv.org/abs/2006.08217.

*Example.*

>>> import torch
>>> from eckart.optim import SGDP
>>> W = torch.nn.Parameter(torch.eye(4, 16))
>>> target = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
>>> optimizer = SGDP([W], lr=0.1, momentum=0.9)
>>> for _ in range(100):
...     optimizer.zero_grad()
...     (-torch.cosine_similarity(W, target)).sum().backward()
...     optimizer.step()
>>> bool(torch.cosine_similarity(W, target).min() > 0.99)
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from eckart.optim.guards import Radial
from eckart.optim.rules import Momentum
from eckart.optim.subspace import Subspace
from eckart.records import Claim, Paper, Technique, Verdict


class SGDP(Subspace):
    """Momentum descent whose steps of scale-invariant matrices are orthogonal to them.

    ``delta``: δ of the test; ``wd_ratio``: ρ; in the groups as ``radial_delta`` and ``radial_ratio``. Vectors get AdamW
    with ``betas`` and ``eps``. Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule=Momentum(momentum, nesterov), guards=Radial(delta, wd_ratio), weight_decay=weight_decay,
            **options,
        )  # fmt: skip


Make = Callable[[list[Tensor], float], torch.optim.Optimizer]


def turned(make: Make, lr: float, steps: int) -> tuple[float, float]:
    """1 − mean cosine to their targets, and mean length, of 8 scale-invariant rows of 64 numbers after ``steps``."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    start = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    W = torch.nn.Parameter(start / start.norm(dim=1, keepdim=True))
    optimizer = make([W], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(1 - torch.cosine_similarity(W, target).mean())
        optimizer.step()
    rows = W.detach()
    return float(1 - torch.cosine_similarity(rows, target).mean()), float(rows.norm(dim=1).mean())


def compared(ours: Make, plain: Make, lrs: Sequence[float]) -> Verdict:
    """Whether ``ours`` has shorter weights and smaller gaps after 100 steps than ``plain``, at each of the rates."""
    figures: dict[str, float] = {}
    held = True
    for lr in lrs:
        gap, length = turned(ours, lr, 100)
        other_gap, other_length = turned(plain, lr, 100)
        held = held and gap < other_gap and length < other_length
        figures |= {f"gap_{lr:g}": gap, f"gap_plain_{lr:g}": other_gap}
        figures |= {f"length_{lr:g}": length, f"length_plain_{lr:g}": other_length}
    return Verdict(held=held, figures=figures)


def _claim() -> Verdict:
    return compared(lambda p, lr: SGDP(p, lr), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), (0.03, 0.1, 0.3))


METHOD = Technique(
    name="sgdp",
    summary="momentum descent without the part of its steps that only lengthens scale-invariant weights",
    paper=Paper(
        authors="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha",
        title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        year=2021,
        link="https://arxiv.org/abs/2006.08217",
    ),
    entry=SGDP,
    claim=Claim(
        statement="On weights of which only the direction matters, after 100 steps at each of three rates, weights are "
        "shorter and directions nearer to their targets than with momentum descent.",
        source="The toy problem on the sphere and the section on the growth of norms.",
        run=_claim,
    ),
)
