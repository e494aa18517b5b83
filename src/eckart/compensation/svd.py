r"""Plain SVD of the residual: the repair that needs no data. The baseline.

*What it does.* Adds back the largest singular directions of what the rounding or pruning took away.

*Formula.* E = W − Ŵ = U S Vᵀ, repair U_k S_k V_kᵀ, which minimises ‖E − R‖²_F; the error left is Σ_{i>k} s_i². In
the terms of tr(G (E − R) Σ (E − R)ᵀ): G = I, Σ = I.

*Cost.* One eigendecomposition of the smaller side p of W (m × n): O(m n p).

*When it does not help.* Errors of rounding to the nearest are close to white noise, with a flat spectrum: rank k of p
takes little more than k/p of ‖E‖². Wherever there are data the other methods are better at the same rank. On the small
causal model of `benchmarks/compensate.py` (width 128) it won back 72 % of the bits that 4-bit rounding lost at rank 32
and 33 % at rank 8, where `kfac` won back 88 % and 63 %.

*Departs from the paper in.* ZeroQuant-V2 quantises the two factors to 8 bits; here they keep the dtype of W. LQER
adds a scaling by activation sizes, which is `qera` with ``diagonal=true``, there with derived scales.

*Reference.* Z. Yao, X. Wu, C. Li, S. Youn, Y. He, “ZeroQuant-V2: Exploring Post-training Quantization in LLMs from
Comprehensive Study to Low Rank Compensation”, 2023, https://arxiv.org/abs/2303.08302; C. Zhang, J. Cheng,
G. Constantinides, Y. Zhao, “LQER: Low-Rank Quantization Error Reconstruction for LLMs”, 2024.

*Example.*

>>> import torch
>>> W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> found = repair(W, W.round(), None, Options(), 2)
>>> tail = torch.linalg.svdvals(W - W.round())[2:].square().sum()
>>> bool(torch.isclose((W - W.round() - found.form.dense()).square().sum(), tail))
True
>>> bool(torch.isclose(found.errors[2], tail))
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.compensation.method import CompensateMethod, Repair, weighted_repair
from eckart.compensation.trial import LINEAR, RANKS, as_figures, rises, rounded
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the decomposition has no free choice."""


def repair(weight: Tensor, approximation: Tensor, moments: SiteMoments | None, options: Options, rank: int) -> Repair:
    """The leading singular directions of W − Ŵ (out, in); ``moments`` are not looked at."""
    return weighted_repair(weight, approximation, rank)


def _run_claim() -> Verdict:
    deviation = 0.0
    for name in LINEAR:
        W = learned_problem().weights(name)["weight"]
        tails = torch.linalg.svdvals(W.double() - rounded(W).double()).square().flip(0).cumsum(0).flip(0)
        for rank in RANKS:
            found = repair(W.double(), rounded(W).double(), None, Options(), rank)
            left = (W.double() - rounded(W).double() - found.form.dense()).square().sum()
            deviation = max(deviation, abs(float(left / tails[rank]) - 1))
    found_rises = rises(lambda w, a, m, rank: repair(w, a, None, Options(), rank), samples=1)
    before = found_rises.pop(0)
    return Verdict(
        held=deviation < 1e-9 and all(value < before for value in found_rises.values()),
        figures={"error against tail, relative": deviation, "unrepaired: loss rise": before}
        | as_figures("svd", found_rises),
        note="4 learned maps rounded to 4 bits by row",
    )


METHOD = CompensateMethod(
    name="svd",
    summary="plain SVD of the residual, no data; the baseline (ZeroQuant-V2's LoRC)",
    paper=Paper(
        authors="Z. Yao, X. Wu, C. Li, S. Youn, Y. He",
        title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank "
        "Compensation",
        year=2023,
        link="https://arxiv.org/abs/2303.08302",
    ),
    needs=frozenset(),
    options=Options,
    repair=repair,
    loss_units=False,
    claim=Claim(
        statement="The squared error left is the tail of squared singular values to 1e-9, and the held-out loss of "
        "maps rounded to 4 bits rises less with the repair than without, at ranks 4, 8 and 16.",
        source="Yao et al. 2023: low-rank compensation recovers quality at a small extra size",
        run=_run_claim,
    ),
)
