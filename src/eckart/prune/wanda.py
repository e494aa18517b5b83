r"""Wanda: magnitude times the size of the input, compared within each output.

*What it does.* A small weight on a large input matters more than a large weight on a small one. Scores every weight by
the energy that it passes on, and keeps the same number in every row.

*Formula.* score_ij = |W_ij| · E[x_j²]^½; each row keeps its ⌊keep · in⌋ highest. Its square is what the output loses
where nothing else changes: the diagonal of the objective of :func:`refit`.

*Cost.* One pass over the weights; of the moments only the diagonal of E[x xᵀ].

*When it does not help.* It compensates nothing: at half kept, MiniLM's cosine is .85 with it and .94 after
:func:`refit` on the same mask, and the gap grows with sparsity (`benchmarks/prune_oneshot.py`). It is blind to which
outputs matter and gives every layer the same share.

*Departs from the paper in.* Second moments are means over tokens of the original model; the authors' code prunes block
after block and sees the inputs that earlier pruned blocks give.

*Reference.* M. Sun, Z. Liu, A. Bair, J. Z. Kolter, “A Simple and Effective Pruning Approach for Large Language Models”,
2023, https://arxiv.org/abs/2306.11695.

*Example.*

>>> import torch
>>> W = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
>>> wanda_mask(W, torch.tensor([100.0, 1.0, 1.0, 1.0]), 0.5)  # the first input is ten times as large
tensor([[ True, False, False,  True]])
"""

from __future__ import annotations

from torch import Tensor

from eckart.compression.trial import LINEAR, calibrations
from eckart.errors import InputError
from eckart.evidence import learned_problem
from eckart.moments import SiteMoments
from eckart.prune.magnitude import magnitude_masks
from eckart.prune.patterns import Pattern, parse_pattern
from eckart.prune.refit import pruned_rise
from eckart.records import Claim, Paper, Technique, Verdict


def wanda_scores(weight: Tensor, second: Tensor) -> Tensor:
    """|W_ij| · E[x_j²]^½, (out, in) float64 on the device of W; ``second`` is E[x xᵀ] (in, in) or its diagonal (in,).

    Raises InputError for shapes that do not fit.
    """
    diagonal = second.diagonal() if second.ndim == 2 else second
    if weight.ndim != 2 or tuple(diagonal.shape) != (weight.shape[1],):
        raise InputError(
            f"wanda: expected W (out, in) and E[x xᵀ] (in, in) or its diagonal; got {tuple(weight.shape)} and "
            f"{tuple(second.shape)}."
        )
    return weight.detach().double().abs() * diagonal.to(weight.device).double().clamp(min=0.0).sqrt()


def wanda_mask(weight: Tensor, second: Tensor, keep: float | None = None, pattern: str | Pattern = "row") -> Tensor:
    """The bool mask (out, in) of the weights that pass on most.

    ``second``: E[x xᵀ] (in, in) or its diagonal (in,). ``keep``: share of the weights, None for "keep n of m".
    ``pattern``: ``row`` as published, or any other. Raises InputError for what does not fit, NotFiniteError for NaN,
    BudgetError where nothing would stay.
    """
    return parse_pattern(pattern).mask(wanda_scores(weight, second), keep)


def diagonal_of(moments: SiteMoments, name: str) -> Tensor:
    """E[x_j²] (in,). Raises InputError where the moments have none."""
    if moments.diagonal is None:
        raise InputError(f"{name}: expected moments with E[x xᵀ]; got none; calibrate with data.")
    return moments.diagonal


def _run_claim() -> Verdict:
    problem = learned_problem()
    weights = {name: problem.weights(name)["weight"] for name in LINEAR}
    figures, held = {}, True
    for keep in (0.5, 0.3):
        plain = magnitude_masks(weights, keep, scope="row")
        figures[f"keep {keep:g}, magnitude by row: loss rise"] = pruned_rise(
            plain, calibrations()[0], refitted=False, biased=False
        )
        rises = [
            pruned_rise(
                {n: wanda_mask(weights[n], diagonal_of(m[n], n), keep) for n in LINEAR},
                m,
                refitted=False,
                biased=False,
            )
            for m in calibrations()
        ]
        figures[f"keep {keep:g}, wanda: loss rise"] = sum(rises) / len(rises)
        held = held and sum(rises) / len(rises) < figures[f"keep {keep:g}, magnitude by row: loss rise"]
    return Verdict(held=held, figures=figures, note="nats per byte; 4 learned maps, 3 calibration samples")


METHOD = Technique(
    name="wanda",
    summary="magnitude times the size of the input, within each row",
    paper=Paper(
        authors="M. Sun, Z. Liu, A. Bair, J. Z. Kolter",
        title="A Simple and Effective Pruning Approach for Large Language Models",
        year=2023,
        link="https://arxiv.org/abs/2306.11695",
    ),
    entry=wanda_mask,
    claim=Claim(
        statement="With 50 and 30 % of four learned maps kept, the held-out loss rises less with Wanda than with "
        "magnitude by row (mean of 3 calibration samples).",
        source="Sun et al. 2023, tables of perplexity: Wanda against magnitude",
        run=_run_claim,
    ),
)
