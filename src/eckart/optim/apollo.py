r"""APOLLO: the gradient itself, its channels scaled as Adam would scale them in a random subspace.

*What it does.* Needs from Adam only how much it scales each channel, and reads that off a random projection of the
gradient to r dimensions (r = 1 and one factor for the whole matrix in APOLLO-Mini). The step is the whole gradient
times these factors, so nothing is lost of its directions.

*Formula.* For G (m × n), m > n: R = G Pᵀ with P (r × n) of independent N(0, 1/r), drawn anew every T steps from a seed;
N = Adam(R); s_i = ‖N_i‖ / ‖R_i‖ for each of the m rows (or ‖N‖ / ‖R‖ for all); U = diag(s) G; ‖U_t‖ is kept at most
1.01 ‖U_{t−1}‖; W ← W − η √α U. α = 1, and 128 for Mini.

*Cost.* State 2 r max(m, n) numbers, two of a matrix for Mini, and a seed. A step: one product of m n r, and P.

*When it does not help.* Where coordinates of one channel need different rates, as in embeddings with rare entries: a
channel's direction is that of the plain gradient, without momentum in it. Mini wants rates of its own: on the problem
of the claim it ends at 2.276 nats per byte (rate 0.1) where rank 24 ends at 2.212 (0.16) and AdamW at 2.281 (0.02).
The limit on growth makes no difference there (2.319 against 2.321 at 0.04).

*Departs from the paper in.* Adam's correction of the bias lies within s (there it multiplies the rate), so that the
limit sees it. P is drawn on the device from a seed that is in the state; the released code keeps the seed in
``state`` from the constructor on, where FSDP2 loses it. Weight decay acts before the step.

*Reference.* H. Zhu, Z. Zhang and others, “APOLLO: SGD-like Memory, AdamW-level Performance”, 2024,
https://arxiv.org/abs/2412.05270.

*Example.*

>>> import torch
>>> from eckart.optim import Apollo
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(64, 32))
>>> A = torch.randn(64, 32, generator=generator)
>>> optimizer = Apollo([W], lr=0.02, mini=True)
>>> for step in range(400):
...     optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
...     optimizer.zero_grad()
...     (W - A).square().sum().backward()
...     optimizer.step()
>>> bool((W - A).norm() < 0.1 * A.norm())
True
>>> sum(value.numel() for value in optimizer.state[W].values() if torch.is_tensor(value)) < 140  # of 2048 weights
True
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim.optimizer import ParamsT

from eckart.optim.galore import GaLore
from eckart.optim.guards import Growth
from eckart.optim.residuals import ChannelResidual
from eckart.optim.subspace import Subspace
from eckart.optim.trial import RANK, best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class Apollo(Subspace):
    """The gradient with channels scaled as by Adam in ``rank`` random directions, drawn anew every ``every`` steps.

    ``mini``: rank 1 and one factor per matrix (APOLLO-Mini), where ``rank`` and ``scale`` are not given. ``scale``:
    √α on the steps of matrices, by default 1, and √128 for ``mini``. ``growth``: how much the norm of a step may
    grow, in the groups as ``growth_limit``. Vectors, and matrices whose smaller side is at most ``rank``, get AdamW.
    Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mini: bool = False,
        rank: int | float | None = None,
        every: int = 200,
        scale: float | str | None = None,
        growth: float = 1.01,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule="adam", subspace="gaussian", residual=ChannelResidual("tensor" if mini else "channel"),
            guards=Growth(growth), betas=betas, eps=eps, weight_decay=weight_decay, every=every,
            rank=rank if rank is not None else (1 if mini else 256),
            scale=scale if scale is not None else (math.sqrt(128) if mini else 1.0), **options,
        )  # fmt: skip


def _claim() -> Verdict:
    apollo = best_loss(lambda groups: Apollo(groups, rank=RANK, every=50), (0.16,))
    galore = best_loss(lambda groups: GaLore(groups, rank=RANK, every=50), (0.16, 0.32))
    return Verdict(held=apollo < galore, figures={"apollo": apollo, "galore": galore})


METHOD = Technique(
    name="apollo",
    summary="the gradient, its channels scaled as Adam scales them in a random subspace",
    paper=Paper(
        authors="Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee",
        title="APOLLO: SGD-like Memory, AdamW-level Performance",
        year=2024,
        link="https://arxiv.org/abs/2412.05270",
    ),
    entry=Apollo,
    claim=Claim(
        statement="After 150 steps at rank 24 of 96 the held-out loss is below that of GaLore at the same rank, "
        "each at the best of three or four rates tried on this problem.",
        source="Table of pre-training LLaMA on C4: APOLLO below GaLore at each size.",
        run=_claim,
    ),
)
