r"""AdamP: Adam without the part of its steps that only lengthens the weights.

*What it does.* Weights in front of a normalisation matter by their direction alone. Momentum makes them longer all the
same, and longer weights turn more slowly: the effective learning rate decays before its time. The part of each step
along the weight is left out where the weight looks scale-invariant.

*Formula.* u = Adam's direction; if |cos(g, w)| < δ/√n for all output channels w of n inputs: u ← u − ŵ ⟨ŵ, u⟩ per
channel; else by the same test of the whole matrix on the whole matrix; W ← W − η λ ρ W − η u, with ρ = 0.1 where it
was projected and 1 elsewhere.

*Cost.* State as Adam. A step: some ten passes more over weights and gradients.

*When it does not help.* Where no weights are scale-invariant, as in linear layers of transformers that a norm does
not follow directly: the test fails and it is Adam. δ/√n is small: with noise in the gradients, cosines of n = 100
numbers are of size 0.1 = 1/√n by chance, ten times the threshold, so the gradient must really be orthogonal. At small
rates Adam's own steps do not lengthen weights: on the problem of the claim at a rate of 0.003 they are 0.956 long
after 100 steps with Adam and 1.015 with AdamP.

*Departs from the paper in.* The test is made on the device for both views, where the released code waits for its
result; Nesterov's form is left out.

*Reference.* B. Heo, S. Chun, S. J. Oh and others, “AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights”, 2021, https://arxiv.org/abs/2006.08217.

*Example.*

>>> import torch
>>> from eckart.optim import AdamP
>>> def grown(optimizer):
...     W = torch.nn.Parameter(torch.eye(4, 16))
...     target = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
...     found = optimizer([W], lr=0.1)
...     for _ in range(50):
...         found.zero_grad()
...         (-torch.cosine_similarity(W, target)).sum().backward()
...         found.step()
...     return float(W.norm())
>>> grown(AdamP) < grown(torch.optim.Adam)
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from eckart.optim.guards import Radial
from eckart.optim.sgdp import compared
from eckart.optim.subspace import Subspace
from eckart.records import Claim, Paper, Technique, Verdict


class AdamP(Subspace):
    """AdamW whose steps of scale-invariant matrices are orthogonal to them.

    ``delta``: δ of the test; ``wd_ratio``: ρ; in the groups as ``radial_delta`` and ``radial_ratio``. Vectors get
    AdamW. Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule="adam", guards=Radial(delta, wd_ratio), betas=betas, eps=eps, weight_decay=weight_decay,
            **options,
        )  # fmt: skip


def _claim() -> Verdict:
    return compared(lambda p, lr: AdamP(p, lr), lambda p, lr: torch.optim.Adam(p, lr), (0.01, 0.03))


METHOD = Technique(
    name="adamp",
    summary="Adam without the part of its steps that only lengthens scale-invariant weights",
    paper=Paper(
        authors="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha",
        title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        year=2021,
        link="https://arxiv.org/abs/2006.08217",
    ),
    entry=AdamP,
    claim=Claim(
        statement="On weights of which only the direction matters, after 100 steps at each of two rates, weights are "
        "shorter and directions nearer to their targets than with Adam.",
        source="The toy problem on the sphere and the section on the growth of norms.",
        run=_claim,
    ),
)
