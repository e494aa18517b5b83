r"""EoRA: the repair with the least output error, found in the eigenspace of the inputs.

*What it does.* Projects what compression took away on the directions in which the inputs of the layer really vary,
and keeps those that matter most to the output. Training-free, minutes for large models.

*Formula.* E = W − Ŵ, Σ = E[x xᵀ] = Q Λ Qᵀ; SVD_k(E Q Λ^½) = U S Vᵀ; repair (U S) (Vᵀ Λ^-½ Qᵀ). This minimises
E‖E x − R x‖² = tr((E − R) Σ (E − R)ᵀ) over R of rank k, and the error left is Σ_{i>k} s_i². In the terms of
tr(G (E − R) Σ (E − R)ᵀ): G = I, Σ as it is.

*Cost.* One product with Σ and one eigendecomposition of the smaller side p of W (m × n): O(n² p + p³); a root of Σ
only where n < m.

*When it does not help.* It is `qera` by another road: least output error at rank k is one problem, both give the same
repair, and a test holds them to it. Output errors of different layers cannot be compared, so it has no global budget;
in the claim below `kfac`, which weighs outputs too, is better at each rank. Where hardly anything is lost there is
nothing to win: 8-bit rounding cost the small causal model of `benchmarks/compensate.py` 0.00005 bits per byte, and
what repairs did to that is noise.

*Departs from the paper in.* No inverse and no square root of eigenvalues: U comes from eigh(E Σ Eᵀ) and the repair is
U_k U_kᵀ E, the same matrix where Σ is regular and also right where it is singular (the original lifts eigenvalues
that are not positive to the smallest that is). Σ is a plain mean over tokens; the original's running mean
weighs late samples otherwise. Fine-tuning from this start and quantised factors are left out.

*Reference.* S.-Y. Liu, M. Khadkevich, N. C. Fung, C. Sakr, C.-H. H. Yang, C.-Y. Wang, S. Muralidharan, H. Yin,
K.-T. Cheng, J. Kautz, Y.-C. F. Wang, P. Molchanov, M.-H. Chen, “EoRA: Training-free Compensation for Compressed LLM
with Eigenspace Low-Rank Approximation”, 2024, https://arxiv.org/abs/2410.21271.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(6, 9, generator=generator, dtype=torch.float64)
>>> X = torch.randn(50, 9, generator=generator, dtype=torch.float64) * torch.arange(1, 10)
>>> found = repair(W, W.round(), SiteMoments(count=50, second=X.T @ X / 50), Options(), 2)
>>> left = X @ (W - W.round() - found.form.dense()).T
>>> bool(torch.isclose(left.square().sum(1).mean(), found.errors[2]))
True
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eckart.compensation import svd
from eckart.compensation.method import CompensateMethod, Repair, weighted_repair
from eckart.compensation.trial import RANKS, as_figures, rises
from eckart.compression.needs import needed
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the second moment is used as it is."""


def repair(weight: Tensor, approximation: Tensor, moments: SiteMoments | None, options: Options, rank: int) -> Repair:
    """The repair of Ŵ (out, in) under ``moments.second``. Raises InputError where that is missing."""
    return weighted_repair(weight, approximation, rank, second=needed(moments, "second", "eora"))


def _run_claim() -> Verdict:
    ours = rises(lambda w, a, m, rank: repair(w, a, m, Options(), rank))
    plain = rises(lambda w, a, m, rank: svd.repair(w, a, None, svd.Options(), rank), samples=1)
    return Verdict(
        held=all(ours[rank] < plain[rank] for rank in RANKS),
        figures=as_figures("svd", plain) | as_figures("eora", ours),
        note="4 learned maps rounded to 4 bits by row; rank 0 is without a repair",
    )


METHOD = CompensateMethod(
    name="eora",
    summary="least output error in the eigenspace of the inputs (EoRA; the same optimum as qera)",
    paper=Paper(
        authors="S.-Y. Liu, M. Khadkevich, N. C. Fung, C. Sakr, C.-H. H. Yang, C.-Y. Wang, S. Muralidharan, H. Yin, "
        "K.-T. Cheng, J. Kautz, Y.-C. F. Wang, P. Molchanov, M.-H. Chen",
        title="EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
        year=2024,
        link="https://arxiv.org/abs/2410.21271",
    ),
    needs=frozenset({"second"}),
    options=Options,
    repair=repair,
    loss_units=False,
    claim=Claim(
        statement="The held-out loss of maps rounded to 4 bits rises less with EoRA's repair than with plain SVD's of "
        "the same rank, at ranks 4, 8 and 16 (mean of 3 calibration samples).",
        source="Liu et al. 2024: tables against ZeroQuant-V2's SVD at one rank",
        run=_run_claim,
    ),
)
