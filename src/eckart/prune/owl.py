r"""OWL: blocks with more outliers keep more of their weights.

*What it does.* Shares one budget between layers without a gradient: the blocks in which a few weights carry far more
than the average are the ones that pruning hurts, so they are pruned less.

*Formula.* A_ij = |W_ij| E[x_j²]^½ (Wanda's score), D_b = the share of a block's A above M times their mean. D is
stretched to [0, 2λ], and keep_b = keep + D_b − mean(D), the mean weighted by the parameters, so that the total is met.
All maps of a block get its share.

*Cost.* One pass over the scores.

*When it does not help.* Made for language models of many blocks at high sparsity, where some blocks have heavy
outliers. On the four blocks of a small causal model it did harm: half kept by Wanda and refitted, the loss rises by
.183 nats per token with these shares and by .122 with equal ones. In the claim they win at 70 % zeros (.372 against
.409 nats per byte) and lose at half (.091 against .086). Shares of a budget in units of the loss (``kfac``) are what
helped.

*Departs from the paper in.* Shares are clipped to [0.01, 1] and the rest is spread again until the total is met; the
published code leaves shares as they are and its total drifts where blocks differ in size.

*Reference.* L. Yin, Y. Wu, Z. Zhang, C.-Y. Hsieh, Y. Wang, Y. Jia, G. Li, A. Jaiswal, M. Pechenizkiy, Y. Liang, M.
Bendersky, Z. Wang, S. Liu, “Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity”, 2023, https://arxiv.org/abs/2310.05175.

*Example.*

>>> import torch
>>> spiky = torch.ones(10, 10)
>>> spiky[0] = 30.0  # a tenth of the scores lies far above the mean
>>> owl_shares({"a": spiky, "b": torch.ones(10, 10)}, keep=0.3, threshold=5.0, spread=0.08)
{'a': 0.38, 'b': 0.22}
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from eckart.compression.trial import LINEAR, calibrations
from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.prune.patterns import Row, check_keep
from eckart.prune.refit import pruned_rise
from eckart.prune.wanda import diagonal_of, wanda_scores
from eckart.records import Claim, Paper, Technique, Verdict

LEAST = 0.01
"""No map keeps less."""


def owl_shares(
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    groups: Mapping[str, Hashable] | None = None,
    threshold: float = 5.0,
    spread: float = 0.08,
) -> dict[str, float]:
    """The share of weights that each map keeps, in [0.01, 1], so that together they keep ``keep``.

    Args:
        scores: Wanda's, (…, out, in) by map; see :func:`eckart.prune.wanda_scores`.
        keep: share of all weights, in (0, 1].
        groups: the block of each map; maps without one, and all of them by default, stand for themselves.
        threshold: M, above 0: what counts as an outlier, in multiples of the mean score.
        spread: λ, in [0, 1): shares lie within 2λ of each other.

    Raises InputError for options out of range, NotFiniteError for scores that are not finite.
    """
    keep, wrong = check_keep(keep), []
    if not isinstance(threshold, (int, float)) or not 0 < threshold < float("inf"):
        wrong.append(f"threshold is a number above 0; got {threshold!r}")
    if not isinstance(spread, (int, float)) or not 0 <= spread < 1:
        wrong.append(f"spread is in [0, 1); got {spread!r}")
    if not scores:
        wrong.append("no scores were given")
    if wrong:
        raise InputError(problems("owl_shares", wrong))
    if bad := [name for name, A in scores.items() if not bool(A.isfinite().all())]:
        raise NotFiniteError(problems("scores are NaN or infinite", bad))
    block = {name: (groups or {}).get(name, name) for name in scores}
    outliers: dict[Hashable, float] = {}
    for group in dict.fromkeys(block.values()):
        A = torch.cat([scores[name].flatten() for name in scores if block[name] == group])
        outliers[group] = float((threshold * A.mean() < A).double().mean())
    low, high = min(outliers.values()), max(outliers.values())
    stretch = 2 * spread / (high - low) if high > low else 0.0
    wanted = {name: (outliers[block[name]] - low) * stretch for name in scores}
    return balanced(wanted, {name: A.numel() for name, A in scores.items()}, keep)


def balanced(
    wanted: Mapping[str, float], sizes: Mapping[str, int], keep: float, least: float = LEAST
) -> dict[str, float]:
    """wanted + c, clipped to [``least``, 1], with c such that maps of these ``sizes`` together keep ``keep``."""
    least = min(least, keep)
    low, high = -1 - max(wanted.values()), 1 - min(wanted.values())
    total = sum(sizes.values())
    for _ in range(100):
        shift = (low + high) / 2
        if sum(sizes[n] * min(1.0, max(least, w + shift)) for n, w in wanted.items()) < keep * total:
            low = shift
        else:
            high = shift
    return {name: round(min(1.0, max(least, w + high)), 12) for name, w in wanted.items()}


def _run_claim() -> Verdict:
    problem = learned_problem()
    weights = {name: problem.weights(name)["weight"] for name in LINEAR}
    figures: dict[str, float] = {}
    held = True
    for keep in (0.5, 0.3):
        rises = {"equal shares": 0.0, "owl": 0.0}
        for moments in calibrations():
            scores = {n: wanda_scores(W, diagonal_of(moments[n], n)) for n, W in weights.items()}
            for name, shares in (("equal shares", dict.fromkeys(LINEAR, keep)), ("owl", owl_shares(scores, keep))):
                masks = {n: Row().mask(scores[n], shares[n]) for n in LINEAR}
                rises[name] += pruned_rise(masks, moments, refitted=False, biased=False) / len(calibrations())
        figures |= {f"keep {keep:g}, {name}: loss rise": rise for name, rise in rises.items()}
        held = rises["owl"] < rises["equal shares"]  # of the last, the 70 % of zeros that the paper speaks of
    return Verdict(held=held, figures=figures, note="nats per byte; 4 learned maps by Wanda, 3 calibration samples")


METHOD = Technique(
    name="owl",
    summary="layer shares by outliers: blocks with more of them keep more weights",
    paper=Paper(
        authors="L. Yin, Y. Wu, Z. Zhang, C.-Y. Hsieh, Y. Wang, Y. Jia, G. Li, A. Jaiswal, M. Pechenizkiy, Y. Liang, "
        "M. Bendersky, Z. Wang, S. Liu",
        title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        year=2023,
        link="https://arxiv.org/abs/2310.05175",
    ),
    entry=owl_shares,
    claim=Claim(
        statement="With 30 % of four learned maps kept by Wanda, the held-out loss rises less with OWL's shares than "
        "with equal ones (mean of 3 calibration samples).",
        source="Yin et al. 2023, table of perplexity: OWL against uniform shares at 70 % sparsity",
        run=_run_claim,
    ),
)
