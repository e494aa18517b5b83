r"""Truncated singular value decomposition: the best low-rank matrix when nothing but the weight is known.

*What it does.* Keeps the k largest singular values of W. Needs no data.

*Formula.* W = U S Vᵀ, Ŵ = U_k S_k V_kᵀ, which minimises ‖W − Ŵ‖²_F; the error is Σ_{i>k} s_i². In the
terms of the shared objective tr(G ΔW Σ ΔWᵀ): G = I, Σ = I.

*Cost.* One Gram matrix and one eigendecomposition of the smaller side p of W (m × n): O(m n p).

*When it does not help.* On trained transformers, nearly always: weights are close to full rank while
their inputs are not, and the error is spent where no input goes. Use it where there is no data, or as a
baseline.

*Departs from the paper in.* Nothing; singular values below 1e-8 of the largest are lost in the Gram
matrix.

*Reference.* C. Eckart, G. Young, “The approximation of one matrix by another of lower rank”,
Psychometrika, 1936, https://doi.org/10.1007/BF02288367.

*Example.*

>>> import torch
>>> W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> prepared = prepare({"weight": W}, None, Options())
>>> tail = torch.linalg.svdvals(W)[2:].square().sum()
>>> bool(torch.isclose(prepared.errors[2], tail))
True
>>> error = W - METHOD.cut(prepared, 2, "lowrank").dense()
>>> bool(torch.isclose(error.square().sum(), tail))
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Prepared
from eckart.compression.trial import KEEPS, LINEAR, calibrations, uniform_rank
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the decomposition has no free choice."""


def fits(site: Site) -> str | None:
    """Every map fits."""
    return None


def prepare(weights: Mapping[str, Tensor], moments: SiteMoments | None, options: Options) -> Prepared:
    """The singular value decomposition of ``weights["weight"]`` (out, in); ``moments`` are not looked at."""
    return factorise(weights)


def _run_claim() -> Verdict:
    """Against random subspaces, the span of the largest rows, and the optimum under another metric."""
    generator = torch.Generator().manual_seed(0)
    moments = calibrations()[0]
    closest, deviation = float("inf"), 0.0
    for name in LINEAR:
        W = learned_problem().weights(name)["weight"].double()
        prepared = prepare({"weight": W}, None, Options())
        for rank in (uniform_rank(W, keep) for keep in KEEPS):
            error = float((W - cut(prepared, rank, "lowrank").dense()).square().sum())
            deviation = max(deviation, abs(error / float(prepared.errors[rank]) - 1))
            random = torch.randn(W.shape[1], rank, generator=generator, dtype=W.dtype)
            largest = W[W.norm(dim=1).topk(rank).indices].T
            spans = (torch.linalg.qr(basis).Q for basis in (random, largest))
            others = [W @ Q @ Q.T for Q in spans]
            others.append(cut(factorise({"weight": W}, second=moments[name].second), rank, "lowrank").dense())
            closest = min(closest, *(float((W - other).square().sum()) / error for other in others))
    return Verdict(
        held=closest > 1 and deviation < 1e-9,
        figures={"nearest rival's squared error / SVD's": closest, "error against tail, relative": deviation},
        note="4 learned maps, 3 ranks each; rivals: random subspace, span of largest rows, whitened factors",
    )


METHOD = CompressMethod(
    name="svd",
    summary="plain truncated SVD, no data",
    paper=Paper(
        authors="C. Eckart, G. Young",
        title="The approximation of one matrix by another of lower rank",
        year=1936,
        link="https://doi.org/10.1007/BF02288367",
    ),
    needs=frozenset(),
    options=Options,
    fits=fits,
    prepare=prepare,
    cut=cut,
    loss_units=False,
    claim=Claim(
        statement="No rival of that rank is nearer in Frobenius norm, and the squared error is the tail of "
        " squared singular values to 1e-9.",
        source="Eckart, Young 1936, the theorem",
        run=_run_claim,
    ),
)
