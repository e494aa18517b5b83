r"""GaLore: Adam in the leading singular directions of the gradient.

*What it does.* Keeps the moments of Adam for r directions of each matrix instead of all of them. The directions are the
leading singular vectors of a gradient, found anew every 200 steps; what lies outside of them is not used.

*Formula.* For G (m × n) with m > n: Q = the r leading right singular vectors of G at the last refresh, R = G Q,
N = Adam(R), W ← W − η λ W − η s N Qᵀ; for m ≤ n the same on the left. Moments stay as they are at a refresh.

*Cost.* State 2 r max(m, n) + r min(m, n) numbers. A step: two products of m n r. A refresh: a product of m n min(m,
n) and the eigenvectors of min(m, n)² numbers, at 1024 × 4096 and rank 128 about twenty steps of its own; over several
parameters it is spread. ``Subspace(subspace="power")`` follows the same directions without it.

*When it does not help.* Where the state of Adam is not what fills the memory: a step takes several times as long as
one of AdamW, and at equal learning rates its steps are s = ¼ as long. Where gradients have no leading directions. On
the problem of the claim (150 steps, rank 24 of 96, one seed) it ends at 2.334 nats per byte, with the subspace of the
first step kept at 2.343 and AdamW at 2.281; Fira (2.306), FRUGAL (2.223) and APOLLO (2.212), each at the best of the
rates tried, have as much state and end lower.

*Departs from the paper in.* The singular vectors come from the eigenvectors of G Gᵀ in float64, with the largest
entry positive; refreshes are spread over the parameters where the released code has all at once, and square matrices
are projected on the left (as in the paper, not its code). Weight decay acts before the step and ε is added to √v̂, as
in torch's AdamW; the released code decays after it and adds ε to √v.

*Reference.* J. Zhao, Z. Zhang, B. Chen, Z. Wang, A. Anandkumar, Y. Tian, “GaLore: Memory-Efficient LLM Training by
Gradient Low-Rank Projection”, 2024, https://arxiv.org/abs/2403.03507.

*Example.*

>>> import torch
>>> from eckart.optim import GaLore
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(64, 32))
>>> A = torch.randn(64, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
>>> optimizer = GaLore([W], lr=0.5, rank=4, every=20)
>>> for _ in range(300):
...     optimizer.zero_grad()
...     (W - A).square().sum().backward()
...     optimizer.step()
>>> bool((W - A).norm() < 0.05 * A.norm())
True
>>> sum(value.numel() for value in optimizer.state[W].values() if torch.is_tensor(value)) < 0.4 * 2 * W.numel()
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from eckart.optim.subspace import Subspace
from eckart.optim.trial import RANK, best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class GaLore(Subspace):
    """Adam in the ``rank`` leading singular directions of the gradient, found every ``every`` steps.

    ``rank``: a count, or a share of the smaller side; ``scale``: s, what steps of matrices are multiplied by. Vectors,
    and matrices whose smaller side is at most ``rank``, get AdamW. Other ``options`` are those of :class:`Subspace`.
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
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule="adam", subspace="svd", betas=betas, eps=eps, weight_decay=weight_decay, rank=rank,
            every=every, scale=scale, **options,
        )  # fmt: skip


def _claim() -> Verdict:
    adamw = best_loss(lambda groups: torch.optim.AdamW(groups, weight_decay=0.0), (0.02,))
    galore = best_loss(lambda groups: GaLore(groups, rank=RANK, every=50), (0.32,))
    first = best_loss(lambda groups: GaLore(groups, rank=RANK, every=10**6), (0.32,))
    figures = {"adamw": adamw, "galore": galore, "first_subspace_kept": first}
    return Verdict(held=galore < 1.03 * adamw and galore < first, figures=figures)


METHOD = Technique(
    name="galore",
    summary="Adam in the leading singular directions of the gradient",
    paper=Paper(
        authors="Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
        title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        year=2024,
        link="https://arxiv.org/abs/2403.03507",
    ),
    entry=GaLore,
    claim=Claim(
        statement="After 150 steps with a quarter of the directions the held-out loss is at most 3 % above AdamW's, "
        "and below that with the first subspace kept.",
        source="Table 2 (perplexity 34.88 against 34.06 of full-rank training) and the ablation of the refresh period.",
        run=_claim,
    ),
)
