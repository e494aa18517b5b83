"""Embeddings of a model against those of its original."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import normalize

from eckart.errors import InputError, NotFiniteError
from eckart.evaluation.bootstrap import bootstrap, interval, resample
from eckart.evaluation.measured import Measured, few_units, wide
from eckart.records import Interval

PAIRED_SENTENCES = 2000
"""Pairs grow with the square of the sentences; the rank correlation looks at the first so many."""


def evaluate_embeddings(model: Tensor, base: Tensor, *, neighbours: int = 10, seed: int = 0) -> Measured:
    """How near embeddings (n, d) are to those of the original (n, d) of the same sentences, row by row.

    - ``cosine``: mean over sentences of the cosine between the two embeddings.
    - ``neighbours@10``: mean share of a sentence's ten nearest sentences that are the same in both.
    - ``rank_correlation``: Spearman's correlation of the similarities of all pairs of sentences.

    Intervals are bootstrapped over sentences, the same resamples for all three; a pair counts as often as
    both of its sentences were drawn, pairs of a sentence with itself are left out, and ranks are those of
    the whole sample. Figures that the data cannot give (neighbours of fewer than 2·10 + 1 sentences,
    correlation of fewer than 3) are left out with a warning. Cost: n² d for the similarities, 40 n² bytes
    for the correlation of at most 2,000 sentences.

    Raises InputError for shapes that differ and NotFiniteError for embeddings with NaN or Inf.
    """
    if model.shape != base.shape or model.ndim != 2 or len(model) < 1:
        raise InputError(
            "expected two sets of embeddings (n, d) of the same sentences; "
            f"got {tuple(model.shape)} and {tuple(base.shape)}. Are these models of one width?"
        )
    for whose, found in (("model", model), ("original", base)):
        if not bool(torch.isfinite(found).all()):
            raise NotFiniteError(f"the embeddings of the {whose} hold NaN or Inf. Check its weights and dtype.")
    one, two = (normalize(E.double().cpu(), dim=1) for E in (model, base))
    n = len(one)
    counts = resample(n, seed=seed)
    metrics: dict[str, Interval] = {"cosine": bootstrap(cosines(one, two), counts=counts)}
    warnings = few_units(n, "sentence")
    if n > 2 * neighbours:
        metrics[f"neighbours@{neighbours}"] = bootstrap(neighbour_overlap(one, two, neighbours), counts=counts)
    else:
        warnings.append(f"neighbours@{neighbours} needs more than {2 * neighbours} sentences; got {n}.")
    correlation = _rank_correlation(one, two, counts)
    if correlation is not None:
        metrics["rank_correlation"] = correlation
    else:
        warnings.append("rank_correlation needs three sentences whose similarities differ.")
    warnings += wide(metrics, {"cosine": 0.1, f"neighbours@{neighbours}": 0.2, "rank_correlation": 0.2})
    return Measured(
        metrics=metrics,
        protocol={"unit": "sentence", "sentences": n, "bootstrap": "over sentences, paired", "seed": seed},
        warnings=tuple(warnings),
    )


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """(n,): cosines of unit rows, as 1 − ½‖u − v‖², which is exact where they are equal."""
    return 1 - 0.5 * (one - two).square().sum(dim=1)


def neighbour_overlap(one: Tensor, two: Tensor, k: int) -> Tensor:
    """(n,): share of the k nearest other rows, by cosine, that are the same in both sets of unit rows."""
    shares = []
    for start in range(0, len(one), 512):
        rows = torch.arange(start, min(start + 512, len(one)))
        near = torch.zeros(2, len(rows), len(one), dtype=torch.bool)
        for side, E in enumerate((one, two)):
            similarity = E[rows] @ E.T
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            near[side].scatter_(1, similarity.topk(k, dim=1).indices, True)
        shares.append((near[0] & near[1]).sum(dim=1).double() / k)
    return torch.cat(shares)


def _rank_correlation(one: Tensor, two: Tensor, counts: Tensor) -> Interval | None:
    """Spearman's correlation over pairs; a resample with counts c weights the pair (i, j) by c_i c_j.

    Every weighted sum Σ_ij c_i c_j M_ij is the quadratic form cᵀ M c, so all resamples cost five products.
    """
    n = min(len(one), PAIRED_SENTENCES)
    if n < 3:
        return None
    R, Q = (_pair_ranks(E[:n]) for E in (one, two))
    if float(R.abs().max()) == 0 or float(Q.abs().max()) == 0:
        return None
    pairs = torch.ones(n, n, dtype=torch.float64).fill_diagonal_(0)
    mean = _correlation([M.sum().unsqueeze(0) for M in (pairs, R, Q, R * R, Q * Q, R * Q)])
    c = counts[:, :n]
    drawn = _correlation([((c @ M) * c).sum(dim=1) for M in (pairs, R, Q, R * R, Q * Q, R * Q)])
    drawn = drawn[torch.isfinite(drawn)]
    return interval(float(mean[0]), drawn, n=n) if len(drawn) else None


def _pair_ranks(E: Tensor) -> Tensor:
    """(n, n): centred ranks of the similarities of pairs, in (−½, ½), ties shared; zero on the diagonal."""
    n = len(E)
    upper = torch.triu_indices(n, n, offset=1)
    similarity = (E @ E.T)[upper[0], upper[1]]
    ranks = torch.from_numpy(rankdata(similarity.numpy()))
    ranks = (ranks - ranks.mean()) / len(ranks)
    out = torch.zeros(n, n, dtype=torch.float64)
    out[upper[0], upper[1]] = ranks
    return out + out.T


def _correlation(sums: list[Tensor]) -> Tensor:
    """Pearson's correlation out of Σ1, Σr, Σq, Σr², Σq², Σrq (each (resamples,))."""
    total, r, q, rr, qq, rq = sums
    return (rq - r * q / total) / ((rr - r * r / total).clamp(min=0) * (qq - q * q / total).clamp(min=0)).sqrt()
