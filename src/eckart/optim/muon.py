r"""Muon: momentum with all its singular values moved to about 1.

*What it does.* Takes the step of steepest descent in the spectral norm, nearly: the momentum of each matrix is made
orthogonal by five products of polynomials, so that all its directions, and not only the strong ones, are followed.

*Formula.* M ← μ M + G; U = G + μ M (Nesterov) or M; O = ``newton_schulz(U)``, singular values in about [0.7, 1.2];
W ← (1 − η λ) W − η f O, with f = √max(1, m/n) ("original"), 0.2 √max(m, n) ("rms", the size of AdamW's steps, whose
rates then fit) or 1.

*Cost.* State: one momentum, half of Adam's. A step for s × l, s ≤ l: 10 s² l + 5 s³ multiply-adds, or in Gram form,
from l ≥ 2 s on, 4 s² l + 14 s³, of which the symmetric products take five eighths.

*When it does not help.* For embeddings, heads, vectors and convolutions of few inputs: they get AdamW where
:func:`param_groups` routes them. Without that every matrix is orthogonalised, embeddings too, and nothing tells you.
Where the step's cost counts: with small batches on a CPU it is most of the time.

*Departs from the paper in.* Iterates on the Gram matrix where that is cheaper, X formed anew after two steps, which
is the same polynomial; computes in the type of the weights unless ``compute_dtype="bf16"``. torch's own Muon (2.13)
keeps M ← μ M + (1 − μ) G, of the same direction, and with bfloat16 weights and no Nesterov momentum normalises the
momentum itself in place; this one does not.

*Reference.* K. Jordan and others, “Muon: An optimizer for hidden layers in neural networks”, 2024,
https://kellerjordan.github.io/posts/muon/; J. Liu and others, “Muon is Scalable for LLM Training”, 2025,
https://arxiv.org/abs/2502.16982.

*Example.*

>>> import torch
>>> from eckart.optim import Muon
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.nn.Parameter(torch.zeros(32, 64))
>>> W.grad = torch.randn(32, 64, generator=generator)
>>> Muon([W], lr=1.0, weight_decay=0.0).step()
>>> S = torch.linalg.svdvals(W.detach())
>>> bool(S.max() < 1.3), bool(S.min() > 0.6), float(torch.linalg.cond(W.grad)) > 4
(True, True, True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from eckart.linalg.polar import QUINTIC
from eckart.optim.rules import NewtonSchulz
from eckart.optim.subspace import Subspace
from eckart.optim.trial import best_loss
from eckart.records import Claim, Paper, Technique, Verdict


class Muon(Subspace):
    """Momentum, made nearly orthogonal by ``ns_steps`` Newton-Schulz steps.

    ``scale``: f, a number or one of :data:`SCALES`: "muon" is √max(1, m/n), "rms" 0.2 √max(m, n). Vectors, and groups
    with ``matrix=False``, get AdamW at ``lr · vector_scale`` with ``betas`` and ``eps``. Stacks and convolutions are
    taken as matrices, see :class:`Subspace` for that and other ``options``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        scale: float | str = "muon",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rule=NewtonSchulz(momentum, nesterov, ns_steps, ns_coefficients), weight_decay=weight_decay,
            scale=scale, **options,
        )  # fmt: skip


def _claim() -> Verdict:
    adamw = best_loss(lambda groups: torch.optim.AdamW(groups, weight_decay=0.0), (0.02,))
    muon = best_loss(lambda groups: Muon(groups), (0.08, 0.16))
    return Verdict(held=muon < adamw, figures={"muon": muon, "adamw": adamw})


METHOD = Technique(
    name="muon",
    summary="momentum with all its singular values moved to about 1",
    paper=Paper(
        authors="Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein",
        title="Muon: An optimizer for hidden layers in neural networks",
        year=2024,
        link="https://kellerjordan.github.io/posts/muon/",
    ),
    entry=Muon,
    claim=Claim(
        statement="After 150 steps the held-out loss is below AdamW's, each at the best of three or four rates "
        "tried on this problem.",
        source="Speed-runs of NanoGPT: fewer steps to equal loss than AdamW.",
        run=_claim,
    ),
)
