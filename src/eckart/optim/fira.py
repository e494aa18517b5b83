r"""Fira: GaLore, with the rest of the gradient scaled as Adam scales its projection.

*What it does.* Keeps Adam's state in the leading directions alone, as GaLore does, and trains in all of them: the part
of the gradient outside is added, each channel times the factor by which Adam changed that channel inside.

*Formula.* For G (m × n), m > n: Q, R = G Q and N = Adam(R) as in :class:`GaLore`; φ_i = ‖N_i‖ / ‖R_i‖ for each row;
S = diag(φ) (G − R Qᵀ); ‖S_t‖ is kept at most 1.01 ‖S_{t−1}‖; W ← W − η s (N Qᵀ + S).

*Cost.* As :class:`GaLore`, and one more pass over the gradient; one number of state more.

*When it does not help.* Where the rest is noise: it is followed in the plain gradient's directions, without momentum.
Where gradients start small, the limit on growth holds S down for long: on the problem of the claim it ends at 2.306
nats per byte, without the limit (``growth=0``) at 2.293, and AdamW with the whole state at 2.281.

*Departs from the paper in.* s = ¼ multiplies the whole step; in the released code it multiplies what its projector
gives back, Q Qᵀ G included, so that the rest there is G − s Q Qᵀ G and not the complement of the paper. Adam's
correction of the bias lies within φ, so that the limit sees it. For the rest see :class:`GaLore`.

*Reference.* X. Chen, K. Feng, C. Li and others, “Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint?”, 2024, https://arxiv.org/abs/2410.01623.

*Example.*

>>> import torch
>>> from eckart.optim import Fira, GaLore
>>> generator = torch.Generator().manual_seed(0)
>>> A = torch.randn(64, 32, generator=generator)
>>> def left(optimizer):
...     W = torch.nn.Parameter(torch.zeros(64, 32))
...     found = optimizer([W], lr=0.1, rank=4)
...     for _ in range(150):
...         found.zero_grad()
...         (W - A).square().sum().backward()
...         found.step()
...     return float((W.detach() - A).norm() / A.norm())
>>> left(Fira) < 0.5 < left(GaLore)
True
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from eckart.optim.galore import GaLore
from eckart.optim.residuals import ScaledResidual
from eckart.optim.subspace import Subspace
from eckart.optim.trial import RANK, best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class Fira(Subspace):
    """:class:`GaLore` that also trains outside of its directions, with Adam's factors per channel.

    ``growth``: how much the norm of that part may grow per step, in the groups as ``residual_growth``; 0: no limit.
    Vectors, and matrices whose smaller side is at most ``rank``, get AdamW. Other ``options`` are those of
    :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        every: int = 200,
        scale: float = 0.25,
        growth: float = 1.01,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule="adam", subspace="svd", residual=ScaledResidual(growth), betas=betas, eps=eps,
            weight_decay=weight_decay, rank=rank, every=every, scale=scale, **options,
        )  # fmt: skip


def _claim() -> Verdict:
    fira = best_loss(lambda groups: Fira(groups, rank=RANK, every=50), (0.16,))
    galore = best_loss(lambda groups: GaLore(groups, rank=RANK, every=50), (0.16, 0.32))
    return Verdict(held=fira < galore, figures={"fira": fira, "galore": galore})


METHOD = Technique(
    name="fira",
    summary="GaLore, with the rest of the gradient scaled as Adam scales its projection",
    paper=Paper(
        authors="Chen, Feng, Li, Lai, Yue, Yuan, Wang",
        title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        year=2024,
        link="https://arxiv.org/abs/2410.01623",
    ),
    entry=Fira,
    claim=Claim(
        statement="After 150 steps at rank 24 of 96 the held-out loss is below that of GaLore at the same rank, "
        "each at the best of three or four rates tried on this problem.",
        source="Table of pre-training LLaMA on C4: Fira below GaLore at each size.",
        run=_claim,
    ),
)
