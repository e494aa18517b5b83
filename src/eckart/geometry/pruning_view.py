r"""Pruning view: norm, angle and margin of each sample before and after a model was pruned or compressed.

*What it does.* Looks at what enters the last layer, and at that layer, in two versions of a classifier. For each
sample it gives the length of the representation, its angle to the direction of the true class, and its distance
from the nearest boundary of that class, before and after; and says which samples the change has cost.

*Formula.* For features h, rows w_c, biases b_c and true class y: norm ‖h‖; angle arccos(⟨h, w_y⟩ / ‖h‖‖w_y‖) in
degrees; margin min_{c≠y} ((w_y − w_c)·h + b_y − b_c) / ‖w_y − w_c‖, the signed Euclidean distance in feature space to
where class c takes over, negative where the sample is misclassified. These are the parts of the softmax loss, whose
logits are ‖h‖‖w_c‖cos θ_c + b_c.

*Cost.* Two products samples × features × classes.

*When it does not help.* Norms and margins scale with the features, so that a model whose features all double shows
doubled margins and has not become more robust; look at the angle, and at margin over norm. Only the last layer
is seen. Distance in feature space is no distance in input space.

*Departs from the paper in.* It is a visual tool; here are the figures that it draws, as findings, without the drawing.

*Reference.* Z. Li, S. Liu, X. Yu, B. Kailkhura, J. Cao, J. D. Diffenderfer, P.-T. Bremer, V. Pascucci, “"Understanding
robustness lottery": a geometric visual comparative analysis of neural network pruning approaches”, 2022,
https://arxiv.org/abs/2206.07918.

*Example.*

>>> import torch
>>> W = torch.eye(2, dtype=torch.float64)
>>> before, after = torch.tensor([[3.0, 0.0], [2.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 2.0]])
>>> view = pruning_view(before, after, W, W, torch.tensor([0, 0]))
>>> view["lost"].details["samples"], round(float(view["angle_change"]), 2)
([1], 18.43)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward
from eckart.geometry.neural_collapse import check_labels
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


@dataclass(frozen=True, eq=False)
class SampleGeometry:
    """Where each sample lies in front of the last layer."""

    norm: Tensor
    """(n,) ‖h‖."""
    angle: Tensor
    """(n,) to the row of the true class, in degrees, 0 to 180; NaN where one of the two is zero."""
    margin: Tensor
    """(n,) distance to the nearest boundary of the true class; negative: misclassified."""


def sample_geometry(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> SampleGeometry:
    """Norm, angle and margin of ``features`` (n, d) under a last layer ``weight`` (K, d), K ≥ 2, and ``bias`` (K,).

    Float64 on the CPU. Raises InputError for shapes that do not belong together, fewer than two classes, rows that
    are equal to that of the true class (no boundary) and labels that are no classes; NotFiniteError for NaN or Inf.
    """
    H = real_tensor(features, "features", "samples × features")
    W = real_tensor(weight, "weight", "classes × features")
    b = torch.zeros(W.shape[0], dtype=W.dtype) if bias is None else real_tensor(bias, "bias", "classes")
    found = []
    if W.shape[1] != H.shape[1]:
        found.append(f"weight has {W.shape[1]} columns, features have {H.shape[1]}")
    if W.shape[0] < 2:
        found.append("a margin needs two classes or more")
    if b.shape[0] != W.shape[0]:
        found.append(f"bias has {b.shape[0]} entries for {W.shape[0]} classes")
    if found:
        raise InputError(problems("sample_geometry", found))
    y = check_labels(labels, H.shape[0], W.shape[0])
    norm, own = H.norm(dim=1), W[y]
    cosine = (H * own).sum(1) / (norm * own.norm(dim=1))
    logits = H @ W.T + b
    gap = logits.gather(1, y[:, None]) - logits
    between = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")[y]
    others = torch.ones_like(gap, dtype=torch.bool).scatter_(1, y[:, None], False)
    if ((between == 0) & others).any():
        raise InputError("weight: two classes have equal rows, so no boundary lies between them.")
    margin = torch.where(others, gap / between, math.inf).amin(1)
    return SampleGeometry(norm=norm, angle=cosine.clamp(-1, 1).acos().rad2deg(), margin=margin)


def pruning_view(
    features_before: Tensor,
    features_after: Tensor,
    weight_before: Tensor,
    weight_after: Tensor,
    labels: Tensor,
    *,
    bias_before: Tensor | None = None,
    bias_after: Tensor | None = None,
) -> dict[str, Finding]:
    """Findings ``norm_change`` (mean of ln after/before), ``angle_change`` (mean, degrees), ``margin_change`` (mean,
    units of the features) and ``lost`` (share of samples classified rightly before and wrongly after).

    Features (n, d) of the same samples in the same order, d may differ between the models; weights (K, d) and biases
    (K,) of the last layers; ``labels`` (n,) whole numbers. ``details`` of the first three: the values of all samples,
    ``before`` and ``after``; of ``lost``: ``samples``, the indices, ``won``, those that became right, and the mean
    margin before of those lost and of those kept.

    Raises InputError and NotFiniteError as :func:`sample_geometry` does, and where the sample counts differ.
    """
    if features_before.shape[:1] != features_after.shape[:1]:
        raise InputError(
            f"pruning_view: the same samples in both models; got {tuple(features_before.shape)} "
            f"and {tuple(features_after.shape)}."
        )
    before = sample_geometry(features_before, weight_before, labels, bias_before)
    after = sample_geometry(features_after, weight_after, labels, bias_after)
    right, still = before.margin > 0, after.margin > 0
    lost = right & ~still
    n = labels.shape[0]
    share = float(lost.double().mean())
    return {
        "norm_change": _change("norm_change", before.norm, after.norm, "", log=True),
        "angle_change": _change("angle_change", before.angle, after.angle, "degrees"),
        "margin_change": _change("margin_change", before.margin, after.margin, ""),
        "lost": Finding(
            name="lost",
            value=share,
            uncertainty=1.96 * math.sqrt(share * (1 - share) / n),
            n=n,
            details={
                "samples": lost.nonzero()[:, 0].tolist(),
                "won": (still & ~right).nonzero()[:, 0].tolist(),
                "margin_of_lost": float(before.margin[lost].mean()) if lost.any() else None,
                "margin_of_kept": float(before.margin[right & still].mean()) if (right & still).any() else None,
            },
        ),
    }


def _change(name: str, before: Tensor, after: Tensor, unit: str, log: bool = False) -> Finding:
    change = (after / before).log() if log else after - before
    usable = change[change.isfinite()]
    n, left_out = usable.numel(), change.numel() - usable.numel()
    return Finding(
        name=name,
        value=float(usable.mean()) if n else None,
        uncertainty=1.96 * float(usable.std()) / math.sqrt(n) if n > 1 else None,
        n=n,
        unit=unit,
        notes=(f"{left_out} samples of length 0 are left out",) if left_out else (),
        details={"before": before.tolist(), "after": after.tolist()},
    )


CLAIM_SAMPLES, CLAIM_PRUNED = 4000, 0.6


def _run_claim() -> Verdict:
    problem = learned_problem()
    windows = problem.held_out[:CLAIM_SAMPLES].long()
    pruned = dict(problem.parameters)
    for name in ("mix", "up", "down"):
        W = pruned[f"{name}.weight"]
        threshold = W.abs().flatten().kthvalue(int(CLAIM_PRUNED * W.numel())).values
        pruned[f"{name}.weight"] = W * (W.abs() > threshold)
    tapes: list[dict[str, tuple[Tensor, Tensor]]] = [{}, {}]
    for parameters, tape in zip((problem.parameters, pruned), tapes, strict=True):
        forward(parameters, windows[:, :CONTEXT], tape)
    W, b = problem.parameters["head.weight"], problem.parameters["head.bias"]
    view = pruning_view(
        tapes[0]["head"][0], tapes[1]["head"][0], W, W, windows[:, CONTEXT], bias_before=b, bias_after=b
    )
    details = view["lost"].details
    figures = {
        "share of samples lost": float(view["lost"]),
        "margin before, of those lost": float(details["margin_of_lost"]),
        "margin before, of those kept": float(details["margin_of_kept"]),
        "mean change of the angle, degrees": float(view["angle_change"]),
    }
    return Verdict(
        held=details["margin_of_lost"] < 0.5 * details["margin_of_kept"] and float(view["angle_change"]) > 0,
        figures=figures,
        note=f"{CLAIM_PRUNED:.0%} of the weights of three maps pruned by magnitude, no retraining",
    )


METHOD = Diagnostic(
    name="pruning-view",
    summary="norm, angle and margin of each sample before and after pruning, and the samples that it cost",
    group="representations",
    paper=Paper(
        authors="Z. Li, S. Liu, X. Yu, B. Kailkhura, J. Cao, J. D. Diffenderfer, P.-T. Bremer, V. Pascucci",
        title="“Understanding robustness lottery”: a geometric visual comparative analysis of neural network pruning "
        "approaches",
        year=2022,
        link="https://arxiv.org/abs/2206.07918",
    ),
    entry=pruning_view,
    claim=Claim(
        statement="Of a language model with 60 % of three maps pruned by magnitude, the samples that turn wrong had "
        "less than half the margin of those that stay right, and angles to the true class grow on average.",
        source="abstract: samples that are robust or fragile to pruning can be told by the geometry",
        run=_run_claim,
    ),
)
