r"""diffGrad: Adam slowed down where the gradient hardly changes.

*What it does.* Multiplies each entry's step of Adam by a friction between ½, where its gradient is what it was at the
last step, and 1, where it changed much.

*Formula.* ξ = σ(|g_{t−1} − g_t|), g_0 = 0; W ← W − η λ W − η ξ m̂/(√v̂ + ε).

*Cost.* State: three numbers per weight (m, v and the last gradient), half as much again as Adam. A step: three passes
more.

*When it does not help.* Where gradients are small: ξ is not invariant to the scale of the loss, and entries that
change by less than 0.1 have ξ between ½ and 0.525, so that it is Adam with half of the rate. In networks of usual
size all are. The claim does not hold here: at rates 0.02, 0.04 and 0.08 it ends at 2.325, 2.281 and 2.288 nats per
byte, Adam at half of them at 2.326, 2.281 and 2.288.

*Departs from the paper in.* Weight decay is decoupled. The released code of the paper's figures keeps a reference to
the gradient's own memory as the last gradient, which makes ξ = ½ everywhere; its second version does what the paper
says, as this does.

*Reference.* S. R. Dubey, S. Chakraborty, S. K. Roy and others, “diffGrad: An Optimization Method for Convolutional
Neural Networks”, 2020, https://arxiv.org/abs/1909.11015.

*Example.*

>>> import torch
>>> from eckart.optim import DiffGrad
>>> W = torch.nn.Parameter(torch.zeros(1, 2))
>>> optimizer = DiffGrad([W], lr=1.0)
>>> W.grad = torch.tensor([[100.0, 0.001]])
>>> optimizer.step()
>>> [round(float(x), 3) for x in W[0]]  # Adam's first step is −1 for both
[-1.0, -0.5]
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from eckart.optim.subspace import Subspace
from eckart.optim.trial import best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class DiffGrad(Subspace):
    """Adam with the friction of diffGrad on matrices; vectors get AdamW.

    Other ``options`` are those of :class:`Subspace`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rule="diffgrad", betas=betas, eps=eps, weight_decay=weight_decay, **options)


def _claim() -> Verdict:
    adam = best_loss(lambda groups: torch.optim.AdamW(groups, weight_decay=0.0), (0.02, 0.04))
    found = best_loss(lambda groups: DiffGrad(groups), (0.04,))
    return Verdict(held=found < 0.995 * adam, figures={"diffgrad": found, "adam": adam})


METHOD = Technique(
    name="diffgrad",
    summary="Adam slowed down where the gradient hardly changes",
    paper=Paper(
        authors="Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri",
        title="diffGrad: An Optimization Method for Convolutional Neural Networks",
        year=2020,
        link="https://arxiv.org/abs/1909.11015",
    ),
    entry=DiffGrad,
    claim=Claim(
        statement="After 150 steps the held-out loss is below Adam's, each at the best of three or four rates tried "
        "on this problem.",
        source="Table of image classification: higher accuracy than Adam.",
        run=_claim,
    ),
)
