r"""Trion: Muon on the momentum's largest cosine components.

*What it does.* Orthogonalises only r directions of the momentum, as Dion does, and takes them from the cosine matrix
instead of a power iteration: no basis is stored or sent, and the products of Newton-Schulz shrink to rank r.

*Formula.* For G (m × n), m > n, Q the cosine matrix (DCT-II): M ← M + G; the indices i of the r columns of M Q with
the largest sums of magnitudes; b = M Q_i; M ← M − (1 − μ) b Q_iᵀ; O = five Newton-Schulz steps on b;
W ← (1 − η λ) W − η f O Q_iᵀ with f = √max(1, m/n) ("original"), 0.2 √max(m, n) ("rms"), √(m/n) ("dion") or 1.

*Cost.* State: the momentum and r indices. A step: the transform (m n log n on the CPU), two products of m n r, and
Newton-Schulz on max(m, n) × r.

*When it does not help.* It does not save state, since the momentum is whole: its gain over Muon is in time and in
what is sent between devices. Its directions hold less of the momentum than those of a power step: the claim does not
hold here, at rank 24 of 96 it ends at 2.397 nats per byte (best of the rates 0.01 to 1) where :class:`Dion` ends at
2.338, AdamW at 2.281 and :class:`Muon` at 2.211.

*Departs from the paper in.* Nothing in the formula. The released code cannot run as published (its update uses names
that are not defined, ``device``, ``dtype`` and ``get_dct_matrix``), needs a process group, and computes in bfloat16,
here the default only where the matrix is bfloat16.

*Reference.* I.-V. Modoranu and others, “FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of
Large Language Models”, 2025, https://arxiv.org/abs/2505.17967.

*Example.*

>>> import torch
>>> from eckart.optim import Trion
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(64, 32))
>>> W.grad = torch.randn(64, 32, generator=generator)
>>> Trion([W], lr=1.0, rank=8).step()
>>> S = torch.linalg.svdvals(W.detach())  # singular values of the step, √(64/32) times those of O
>>> int((S > 1e-4).sum()), bool((S[:8] > 0.9).all()), bool((S[:8] < 1.8).all())
(8, True, True)
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from eckart.optim.dion import Dion
from eckart.optim.feedback import Feedback, Stored
from eckart.optim.rules import NewtonSchulz
from eckart.optim.subspace import Subspace
from eckart.optim.subspaces import DCT
from eckart.optim.trial import RANK, best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class Trion(Subspace):
    """Muon on the ``rank`` largest cosine components of the momentum.

    ``momentum``: μ in [0, 1), in the groups as ``feedback_keep``; ``scale``: f, a number or one of :data:`SCALES`.
    ``feedback``: what the momentum is stored in. Vectors get AdamW with ``betas`` and ``eps``; matrices whose
    smaller side is at most ``rank`` are orthogonalised whole. Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        scale: float | str = "muon",
        feedback: Stored = "fp32",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule=NewtonSchulz(momentum=0.0), subspace=DCT(norm="l1"), rank=rank, every=1, scale=scale,
            feedback=Feedback(feedback, keep=momentum), weight_decay=weight_decay, **options,
        )  # fmt: skip


def _claim() -> Verdict:
    trion = best_loss(lambda groups: Trion(groups, rank=RANK), (0.3,))
    dion = best_loss(lambda groups: Dion(groups, rank=RANK, weight_decay=0.0), (0.1, 0.3))
    return Verdict(held=trion < dion, figures={"trion": trion, "dion": dion})


METHOD = Technique(
    name="trion",
    summary="Muon on the momentum's largest cosine components",
    paper=Paper(
        authors="Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh",
        title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
        year=2025,
        link="https://arxiv.org/abs/2505.17967",
    ),
    entry=Trion,
    claim=Claim(
        statement="After 150 steps at rank 24 of 96 the held-out loss is below that of Dion at the same rank, each "
        "at the best of three or four rates tried on this problem.",
        source="Experiments on pre-training: Trion below Dion at equal rank.",
        run=_claim,
    ),
)
