r"""Atomic feature mimicking (AFM): keep the directions in which the output varies, and its mean exactly.

*What it does.* Principal components of a layer's output; what they miss of the mean goes into the bias.
Embedding tables are decomposed over the rows as they are looked up, so frequent entries count more.

*Formula.* Σ = E[x xᵀ] − μμᵀ, Cov(y) = W Σ Wᵀ = U Λ Uᵀ, Ŵ = U_k U_kᵀ W, b̂ = b + (W − Ŵ) μ. This
minimises E‖(W x + b) − (Ŵ x + b̂)‖² over Ŵ of rank k and b̂ together; the error is Σ_{i>k} λ_i. In the
terms of tr(G ΔW Σ ΔWᵀ): G = I, Σ the covariance. For an embedding table Eᵀ (width × entries) Σ is the
diagonal of frequencies of the entries.

*Cost.* As `whitened`.

*When it does not help.* Where inputs have small means it is `whitened`: in the claim below the bias
term lowers the output error by about 1 % and the rise of the loss by about 2 %. As there, output errors
of different layers cannot be compared, so it is for uniform plans only.

*Departs from the paper in.* Maps without a bias stay without one, and so do embedding tables: there Σ
is not centred. The second factor of a table stays beside it instead of being fused into the next layer.
Factors are computed from the smaller side of W, which gives the same product.

*Reference.* H. Yu, J. Wu, “Compressing Transformers: Features Are Low-Rank, but Weights Are Not!”, AAAI
2023; for embedding tables H. Yu, M. Fu, J. Ding, Y. Zhou, J. Wu, “Unified Low-rank Compression
Framework for Click-through Rate Prediction”, 2024, https://arxiv.org/abs/2405.18146.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> weights = {"weight": torch.randn(6, 9, generator=generator, dtype=torch.float64),
...            "bias": torch.zeros(6, dtype=torch.float64)}
>>> X = torch.randn(50, 9, generator=generator, dtype=torch.float64) + 3
>>> moments = SiteMoments(count=50, mean=X.mean(0), second=X.T @ X / 50)
>>> prepared = prepare(weights, moments, Options())
>>> error = X @ weights["weight"].T - METHOD.cut(prepared, 2, "lowrank").apply(X)
>>> bool(torch.isclose(error.square().sum(1).mean(), prepared.errors[2]))
True
>>> bool(error.mean(0).abs().max() < 1e-12)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from eckart.compression import svd
from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Prepared
from eckart.compression.needs import input_metric, option_flag
from eckart.compression.trial import KEEPS, LINEAR, calibrations, uniform_rank
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """Whether the mean goes through the bias."""

    correct_bias: bool = True
    """Centre the inputs and let the bias take up the mean; false: keep the bias, do not centre."""

    def __post_init__(self) -> None:
        option_flag("afm", "correct_bias", self.correct_bias)


def fits(site: Site) -> str | None:
    """Every map fits."""
    return None


def prepare(weights: Mapping[str, Tensor], moments: SiteMoments | None, options: Options) -> Prepared:
    """The decomposition of W (out, in) under the covariance of its inputs, or under E[x xᵀ] without a bias.

    Raises InputError where ``moments.second`` is missing. A map that has a bias but no ``moments.mean`` is
    treated as one without.
    """
    second, mean = input_metric(weights, moments, options.correct_bias, "afm")
    return factorise(weights, second=second, mean=mean)


def _output_errors(name: str, options: Options, x: Tensor) -> list[float]:
    """E‖y − ŷ‖² of a map at the three sizes, relative to E‖y − E y‖²."""
    weights = {k: v.double() for k, v in learned_problem().weights(name).items()}
    prepared = prepare(weights, calibrations()[0][name], options)
    y = x @ weights["weight"].T + weights["bias"]
    ranks = (uniform_rank(weights["weight"], keep) for keep in KEEPS)
    cuts = (cut(prepared, rank, "lowrank").apply(x) for rank in ranks)
    return [float((y - cut_y).square().mean() / (y - y.mean(0)).square().mean()) for cut_y in cuts]


def _run_claim() -> Verdict:
    problem = learned_problem()
    fresh = problem.inputs(held_out=True)
    ratios: list[float] = []
    for name in LINEAR:
        centred = _output_errors(name, Options(), fresh[name])
        uncentred = _output_errors(name, Options(correct_bias=False), fresh[name])
        ratios += [a / b for a, b in zip(centred, uncentred, strict=True)]

    table = {"weight": problem.weights("embed")["weight"].double()}  # (16, 256)
    weighted = prepare(table, calibrations()[0]["embed"], Options())
    plain = svd.prepare(table, None, svd.Options())
    frequencies = problem.frequencies(held_out=True)

    def table_error(prepared: Prepared, rank: int) -> float:
        lost = table["weight"] - cut(prepared, rank, "lowrank").dense()
        return float((lost.square() @ frequencies).sum())

    table_ratios = [table_error(weighted, rank) / table_error(plain, rank) for rank in (12, 8, 4)]
    return Verdict(
        held=fmean(ratios) < 1 and max(table_ratios) < 1,
        figures={
            "output error with / without bias correction, mean of 12": fmean(ratios),
            "output error with / without bias correction, worst of 12": max(ratios),
            "embedding, frequency-weighted error / svd's, worst of 3": max(table_ratios),
        },
        note="held-out tokens; 4 learned maps at 3 ranks, one table of 256 entries at 3 ranks",
    )


METHOD = CompressMethod(
    name="afm",
    summary="principal components of the output, mean kept by the bias; embeddings by frequency",
    paper=Paper(
        authors="H. Yu, J. Wu",
        title="Compressing Transformers: Features Are Low-Rank, but Weights Are Not!",
        year=2023,
    ),
    needs=frozenset({"mean", "second"}),
    options=Options,
    fits=fits,
    prepare=prepare,
    cut=cut,
    loss_units=False,
    claim=Claim(
        statement="On held-out tokens the bias term lowers the mean output error at equal rank, and an "
        "embedding table decomposed by frequency has a lower frequency-weighted error than by plain SVD.",
        source="Yu, Wu 2023: bias of the second factor; Yu et al. 2024: embedding tables",
        run=_run_claim,
    ),
)
