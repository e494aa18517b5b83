r"""QERA: quantisation error reconstruction by its closed form, exact or with channels taken as uncorrelated.

*What it does.* Minimises the error of the layer's output instead of that of the weight, in closed form.

*Formula.* Σ = E[x xᵀ], E = W − Ŵ; exact: R = SVD_k(E Σ^½) Σ^-½, the minimiser of E‖E x − R x‖²; approximate:
Σ replaced by diag(E x_j²). In the terms of tr(G (E − R) Σ (E − R)ᵀ): G = I, Σ full or its diagonal.

*Cost.* As `eora`; with ``diagonal`` as `svd`, and only a mean of squares per input has to be known.

*When it does not help.* The exact form is `eora` by another road: one problem, one answer, and a test holds the two
to it. The diagonal form does not see that inputs are correlated: in the claim below its output error was above the
exact one at every map and rank, still below plain SVD's. As with `eora`, errors of different layers cannot be compared.

*Departs from the paper in.* No root and no inverse of Σ where out ≤ in; see `eora`. The paper starts fine-tuning of
adapters from this repair too; that is left out.

*Reference.* C. Zhang, J. T. H. Wong, C. Xiao, G. A. Constantinides, Y. Zhao, “QERA: an Analytical Framework for
Quantization Error Reconstruction”, 2024, https://arxiv.org/abs/2410.06040.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(6, 9, generator=generator, dtype=torch.float64)
>>> X = torch.randn(50, 9, generator=generator, dtype=torch.float64) * torch.arange(1, 10)
>>> moments = SiteMoments(count=50, second=X.T @ X / 50)
>>> values, Q = torch.linalg.eigh(moments.second)
>>> root, inverse = Q * values.sqrt() @ Q.T, Q / values.sqrt() @ Q.T
>>> U, S, Vh = torch.linalg.svd((W - W.round()) @ root, full_matrices=False)
>>> found = repair(W, W.round(), moments, Options(), 2)
>>> torch.allclose(found.form.dense(), U[:, :2] * S[:2] @ Vh[:2] @ inverse)
True
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eckart.compensation import svd
from eckart.compensation.method import CompensateMethod, Repair, weighted_repair
from eckart.compensation.trial import LINEAR, RANKS, calibrations, rounded
from eckart.compression.needs import needed, option_flag
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of the inputs' second moment is used."""

    diagonal: bool = False
    """The approximate form: each input by its mean square, correlations left out."""

    def __post_init__(self) -> None:
        option_flag("qera", "diagonal", self.diagonal)


def repair(weight: Tensor, approximation: Tensor, moments: SiteMoments | None, options: Options, rank: int) -> Repair:
    """The repair of Ŵ (out, in) under ``moments.second`` or its diagonal. Raises InputError where that is missing."""
    second = needed(moments, "second", "qera")
    if options.diagonal and second.ndim == 2:
        second = second.diagonal()
    return weighted_repair(weight, approximation, rank, second=second)


def _run_claim() -> Verdict:
    problem, moments = learned_problem(), calibrations()[0]
    fresh = problem.inputs(held_out=True)
    to_exact, to_plain = [], []
    for name in LINEAR:
        W = problem.weights(name)["weight"].double()
        damaged = rounded(W)
        for rank in RANKS:
            exact, diagonal, plain = (
                float((fresh[name] @ (W - damaged - one.form.dense()).T).square().mean())
                for one in (
                    repair(W, damaged, moments[name], Options(), rank),
                    repair(W, damaged, moments[name], Options(diagonal=True), rank),
                    svd.repair(W, damaged, None, svd.Options(), rank),
                )
            )
            to_exact.append(exact / diagonal)
            to_plain.append(diagonal / plain)
    return Verdict(
        held=max(to_exact) < 1 and max(to_plain) < 1,
        figures={
            "output error, exact / diagonal, worst of 12": max(to_exact),
            "output error, exact / diagonal, best of 12": min(to_exact),
            "output error, diagonal / svd, worst of 12": max(to_plain),
            "output error, diagonal / svd, best of 12": min(to_plain),
        },
        note="held-out tokens; 4 learned maps rounded to 4 bits by row, ranks 4, 8 and 16",
    )


METHOD = CompensateMethod(
    name="qera",
    summary="least output error in closed form, or with uncorrelated channels (QERA)",
    paper=Paper(
        authors="C. Zhang, J. T. H. Wong, C. Xiao, G. A. Constantinides, Y. Zhao",
        title="QERA: an Analytical Framework for Quantization Error Reconstruction",
        year=2024,
        link="https://arxiv.org/abs/2410.06040",
    ),
    needs=frozenset({"second"}),
    options=Options,
    repair=repair,
    loss_units=False,
    claim=Claim(
        statement="On held-out tokens the exact repair has a lower output error than the diagonal one, and that a "
        "lower one than plain SVD's, for every map at ranks 4, 8 and 16.",
        source="Zhang et al. 2024: theorems 1 and 2, tables of exact, approximate and LQER",
        run=_run_claim,
    ),
)
