r"""Truncation-aware whitening (SVD-LLM): the least output error that a matrix of that rank can have.

*What it does.* Decomposes W in the coordinates in which its inputs are white, so that the error of
every truncation is exactly the mean squared error of the layer's output on the calibration tokens.

*Formula.* Σ = E[x xᵀ] = S Sᵀ, Ŵ = SVD_k(W S) S⁻¹, which minimises E‖W x − Ŵ x‖² = tr(ΔW Σ ΔWᵀ); the
error is the tail of squared singular values of W S. In the terms of tr(G ΔW Σ ΔWᵀ): G = I, Σ as it is.

*Cost.* One product with Σ and one eigendecomposition of the smaller side p of W (m × n): O(n² p + p³);
a root of Σ only where n < m.

*When it does not help.* Output errors of different layers are not comparable: summed over a model and
minimised, they plan worse than equal ratios, so it is for uniform plans only. With fewer tokens than
features Σ is mostly noise, and with a narrow calibration text it overfits that text; see `kfac`, which
shrinks it.

*Departs from the paper in.* No Cholesky factor and no inverse: W Σ Wᵀ is projected on its leading
eigenvectors (published as Swift-SVD, arXiv 2604.01609), which is the same matrix where Σ is regular and
also right where it is singular. The paper's update of the factors by fine-tuning is left out.

*Reference.* X. Wang, Y. Zheng, Z. Wan, M. Zhang, “SVD-LLM: Truncation-aware Singular Value
Decomposition for Large Language Model Compression”, 2024, https://arxiv.org/abs/2403.07378.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(6, 9, generator=generator, dtype=torch.float64)
>>> X = torch.randn(50, 9, generator=generator, dtype=torch.float64) * torch.arange(1, 10)
>>> prepared = prepare({"weight": W}, SiteMoments(count=50, second=X.T @ X / 50), Options())
>>> error = X @ (W - METHOD.cut(prepared, 2, "lowrank").dense()).T
>>> bool(torch.isclose(error.square().sum(1).mean(), prepared.errors[2]))
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.compression import asvd, svd
from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Prepared
from eckart.compression.needs import needed
from eckart.compression.trial import KEEPS, LINEAR, SEEDS, calibrations, uniform_rank
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the second moment is used as it is."""


def fits(site: Site) -> str | None:
    """Every map fits; the second moment of an embedding's one-hot inputs is the diagonal of frequencies."""
    return None


def prepare(weights: Mapping[str, Tensor], moments: SiteMoments | None, options: Options) -> Prepared:
    """The decomposition of W (out, in) under ``moments.second``. Raises InputError where that is missing."""
    return factorise(weights, second=needed(moments, "second", "whitened"))


def _run_claim() -> Verdict:
    """Rivals get their best exponent, chosen on the very tokens that the errors are measured on."""
    problem = learned_problem()
    calibration, fresh = problem.inputs(seed=SEEDS[0]), problem.inputs(held_out=True)
    deviation, worst, nearest = 0.0, 0.0, float("inf")
    for name in LINEAR:
        weights, moments = {"weight": problem.weights(name)["weight"].double()}, calibrations()[0][name]
        W = weights["weight"]
        own = prepare(weights, moments, Options())
        rivals = [svd.prepare(weights, None, svd.Options())]
        rivals += [asvd.prepare(weights, moments, asvd.Options(alpha=a)) for a in (0.25, 0.5, 0.75, 1.0)]
        for rank in (uniform_rank(W, keep) for keep in KEEPS):

            def error(prepared: Prepared, x: Tensor, W: Tensor = W, rank: int = rank) -> float:
                return float((x @ (W - cut(prepared, rank, "lowrank").dense()).T).square().sum(1).mean())

            deviation = max(deviation, abs(error(own, calibration[name]) / float(own.errors[rank]) - 1))
            ratio = min(error(rival, fresh[name]) for rival in rivals) / error(own, fresh[name])
            worst, nearest = max(worst, ratio), min(nearest, ratio)
    return Verdict(
        held=nearest > 1 and deviation < 1e-9,
        figures={
            "measured against predicted error, relative": deviation,
            "best rival's held-out output error / whitened's, least": nearest,
            "best rival's held-out output error / whitened's, most": worst,
        },
        note="4 learned maps, 3 ranks each; rivals: svd, asvd at the best of 4 exponents",
    )


METHOD = CompressMethod(
    name="whitened",
    summary="truncation-aware whitening: least output error on the calibration data (SVD-LLM)",
    paper=Paper(
        authors="X. Wang, Y. Zheng, Z. Wan, M. Zhang",
        title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        year=2024,
        link="https://arxiv.org/abs/2403.07378",
    ),
    needs=frozenset({"second"}),
    options=Options,
    fits=fits,
    prepare=prepare,
    cut=cut,
    loss_units=False,
    claim=Claim(
        statement="The output error on the calibration tokens is the predicted one to 1e-9, and on held-out "
        "tokens lower than that of svd and of asvd at its best exponent, for every map and rank.",
        source="Wang et al. 2024: truncation loss equals the singular value; perplexity against SVD and ASVD",
        run=_run_claim,
    ),
)
