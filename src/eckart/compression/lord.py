r"""LoRD: one-shot, uniform decomposition of code models by the principal components of their outputs.

*What it does.* Projects every layer's output on the leading eigenvectors of its second moment, with one
share of rank for all layers, no fine-tuning and no bias.

*Formula.* E[y yᵀ] = W Σ Wᵀ = U Λ Uᵀ for y = W x, Σ = E[x xᵀ]; Ŵ = U_k (U_kᵀ W); the error E‖W x − Ŵ x‖²
is Σ_{i>k} λ_i. In the terms of tr(G ΔW Σ ΔWᵀ): G = I, Σ as it is.

*Cost.* As `whitened`.

*When it does not help.* It is `whitened` by another road: least output error at rank k is one problem,
and both give the same Ŵ; a test holds them to it. A rank cut by 39.58 % saves nothing on a square
matrix (k (m + n) numbers need k < m/2), so the paper's figure pays only on wide or tall layers or in
pivoted form.

*Departs from the paper in.* The paper builds on atomic feature mimicking. Here only what tells it from
`afm` is kept: one uniform share of rank, features that are not centred, biases left alone. Which kinds
of layer to decompose is left to include and exclude patterns. Factors are computed from the smaller
side of W. Only the abstract was at hand when this was written, so details of the paper may differ
further.

*Reference.* A. Kaushal, T. Vaidhya, I. Rish, “LORD: Low Rank Decomposition Of Monolingual Code LLMs For
One-Shot Compression”, 2023, https://arxiv.org/abs/2309.14021.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(6, 9, generator=generator, dtype=torch.float64)
>>> X = torch.randn(50, 9, generator=generator, dtype=torch.float64)
>>> moments = SiteMoments(count=50, second=X.T @ X / 50)
>>> Y = X @ W.T
>>> U = torch.linalg.eigh(Y.T @ Y).eigenvectors[:, -2:]
>>> Ŵ = METHOD.cut(prepare({"weight": W}, moments, Options()), 2, "lowrank").dense()
>>> torch.allclose(Ŵ, U @ U.T @ W)
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Prepared
from eckart.compression.needs import needed
from eckart.compression.trial import LINEAR, SEEDS, calibrations
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site, Verdict

REDUCTION = 0.3958
"""Share by which the paper reduces ranks at less than 1 % more perplexity (abstract)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the rank, one share for all layers, belongs to the plan."""


def fits(site: Site) -> str | None:
    """Linear maps, convolutions and experts; not embedding tables."""
    if site.kind == "embedding":
        return "LoRD decomposes the outputs of linear layers; for embedding tables use afm or kfac."
    return None


def prepare(weights: Mapping[str, Tensor], moments: SiteMoments | None, options: Options) -> Prepared:
    """Principal components of the output of W (out, in). Raises InputError without ``moments.second``."""
    return factorise(weights, second=needed(moments, "second", "lord"))


def _run_claim() -> Verdict:
    problem = learned_problem()
    more = {}
    for seed, moments in zip(SEEDS, calibrations(), strict=True):
        forms = {}
        for name in LINEAR:
            weights = problem.weights(name)
            rank = int((1 - REDUCTION) * min(weights["weight"].shape))
            forms[name] = cut(prepare(weights, moments[name], Options()), rank, "lowrank")
        more[f"perplexity rise in %, sample {seed}"] = 100 * math.expm1(problem.rise(forms))
    return Verdict(
        held=all(value < 1 for value in more.values()),
        figures=more,
        note="all four linear maps of a small byte-level model of Python code; the paper's is StarCoder",
    )


METHOD = CompressMethod(
    name="lord",
    summary="one-shot principal components of outputs, one share of rank for all layers",
    paper=Paper(
        authors="A. Kaushal, T. Vaidhya, I. Rish",
        title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
        year=2023,
        link="https://arxiv.org/abs/2309.14021",
    ),
    needs=frozenset({"second"}),
    options=Options,
    fits=fits,
    prepare=prepare,
    cut=cut,
    loss_units=False,
    claim=Claim(
        statement="With the ranks of all linear layers reduced by 39.58 %, the perplexity on held-out code "
        "rises by less than 1 %, for each of 3 calibration samples.",
        source="Kaushal et al. 2023, abstract",
        run=_run_claim,
    ),
)
