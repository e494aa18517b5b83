r"""AuON: momentum over its norm, and Hybrid-AuON: one Newton-Schulz step, then the same brake.

*What it does.* Proposed as Muon in linear time: the momentum is divided by its norm and then by the root mean square
of cosh γX, "an emergency brake" on large entries. For matrices of usual size that divisor is 1, and AuON is momentum
descent with normalised steps; no entry is treated differently from another.

*Formula.* M ← μ M + G, U = G + μ M; X = U/‖U‖_F (or one Newton-Schulz step on it, hybrid);
W ← (1 − η λ) W − η X / √mean cosh²(γX). With N entries of size N^−½, √mean cosh² = 1 + γ²/2N + …: 1 + 8.6e-6 at 256 ×
512 and γ = 1.5.

*Cost.* State: one momentum. A step: four passes over it; hybrid two products of s² l and one of s³ more.

*When it does not help.* Wherever Muon helps: the entries keep their proportions and the singular values too, so weak
directions stay weak. In a table of the paper it ends at a perplexity of 1.54, AdamW at 1.07, Muon at 1.04. The claim
does not hold here: 2.408 nats per byte, to four digits that of normalised momentum (``rule="normalize"``), the hybrid
2.338, AdamW 2.281, Muon 2.211, each at the best of the rates tried.

*Departs from the paper in.* Nothing in the formula; the released code divides the momentum itself, not the one of unit
norm, by the divisor near 1, which makes it plain Nesterov descent, and writes into the gradients. Its hybrid takes five
Newton-Schulz steps (Muon without its factor for shapes) where the paper says one; ``ns_steps`` chooses.

*Reference.* D. Maity, “AuON: A Linear-time Alternative to Orthogonal Momentum Updates”, 2025,
https://arxiv.org/abs/2509.24320.

*Example.*

>>> import torch
>>> from eckart.optim import AuON
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(256, 512))
>>> W.grad = torch.randn(256, 512, generator=generator)
>>> AuON([W], lr=1.0).step()
>>> plain = -W.grad / W.grad.norm()
>>> bool((W.detach() - plain).norm() < 2e-5)  # the brake
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from eckart.optim.rules import AuONRule, Hybrid
from eckart.optim.subspace import Subspace
from eckart.optim.trial import best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class AuON(Subspace):
    """Momentum over its norm; with ``hybrid`` one Newton-Schulz step (``ns_steps``) before the brake.

    ``gamma``: γ ≥ 0. Vectors get AdamW at ``lr · vector_scale`` with ``betas`` and ``eps``. Other ``options`` are
    those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.24,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        hybrid: bool = False,
        ns_steps: int = 1,
        gamma: float = 1.5,
        **options: Any,
    ) -> None:
        rule = (
            Hybrid(momentum, nesterov, steps=ns_steps, gamma=gamma)
            if hybrid
            else AuONRule(momentum, nesterov, gamma=gamma)
        )
        super().__init__(params, lr, rule=rule, weight_decay=weight_decay, **options)


def _claim() -> Verdict:
    adamw = best_loss(lambda groups: torch.optim.AdamW(groups, weight_decay=0.0), (0.02,))
    auon = best_loss(lambda groups: AuON(groups), (0.3,))
    normalised = best_loss(lambda groups: Subspace(groups, rule="normalize"), (0.3,))
    hybrid = best_loss(lambda groups: AuON(groups, hybrid=True), (0.3,))
    figures = {"auon": auon, "adamw": adamw, "hybrid": hybrid, "normalised_momentum": normalised}
    return Verdict(held=auon < 1.02 * adamw, figures=figures)


METHOD = Technique(
    name="auon",
    summary="momentum over its norm and a brake that is 1; with one Newton-Schulz step as a hybrid",
    paper=Paper(
        authors="Maity",
        title="AuON: A Linear-time Alternative to Orthogonal Momentum Updates",
        year=2025,
        link="https://arxiv.org/abs/2509.24320",
    ),
    entry=AuON,
    claim=Claim(
        statement="After 150 steps the held-out loss is at most 2 % above AdamW's.",
        source="Abstract: performance comparable to strong baselines such as AdamW and Muon.",
        run=_claim,
    ),
)
