"""What an inspection measures beyond the weights, where there are data: activations, dimension, curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from eckart.geometry import dimension_curve
from eckart.geometry.effective_rank import effective_rank
from eckart.hf.models import LoadedModel
from eckart.hf.tasks import Batch, embed
from eckart.inspection.record import MatrixFacts, Panel
from eckart.landscape import hessian_spectrum
from eckart.landscape.curvature import ModelLoss
from eckart.moments import Moments
from eckart.records import Finding, Site
from eckart.report.dimension_page import dimension_curves

CURVATURE_ROWS = 8
"""Rows of data that the curvature is measured on."""
CURVATURE_STEPS = 24
"""Steps of Lanczos from each probe; the largest eigenvalue of a trained model needs about as many."""
CURVATURE_PROBES = 4
CURVATURE_BYTES = 4 << 30
"""Memory that the vectors of Lanczos may take: models of up to 44 M parameters."""
DENSITY_POINTS = 120


def activation_panel(moments: Moments, sites: Sequence[Site]) -> Panel | None:
    """The effective rank of what every site reads, by depth, from second moments that are there already."""
    readers: dict[str, Site] = {}
    for site in sites:
        if site.name in moments.input_of and site.slices == 1:
            readers.setdefault(moments.input_of[site.name], site)
    found: dict[str, tuple[Site, Finding]] = {}
    for key, site in readers.items():
        known = moments.site(site.name)
        covariance = known.covariance
        if covariance is not None:
            ranks = effective_rank({site.name: covariance}, kind="moments", samples=known.count)
            found[key] = (site, ranks[site.name])
    measured = [(site, finding) for site, finding in found.values() if finding.value is not None]
    if not measured:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for site, finding in measured:
        if site.depth is not None:
            curves.setdefault(site.role, []).append((site.depth, float(finding)))
    least = min(measured, key=lambda pair: float(pair[1]))
    most = max(measured, key=lambda pair: float(pair[1]))
    return Panel(
        title="Rank of the activations",
        words=f"How many directions the inputs of each layer fill, around their mean, over {least[1].n:,} tokens of "
        f"{moments.meta.get('data', 'the data')}: exp of the entropy of the shares of variance. A weight cannot use "
        "directions that never come. Layers that read the same input are one line.",
        findings=tuple(
            replace(finding, name=name, notes=(f"{site.name}, {site.in_features} wide", *finding.notes))
            for name, (site, finding) in (("fewest_directions", least), ("most_directions", most))
        ),
        curves={role: tuple(sorted(line)) for role, line in curves.items()},
        x="block",
        y="effective rank",
    )


def dimension_panel(loaded: LoadedModel, batches: Sequence[Batch]) -> Panel:
    """The intrinsic dimension of the embeddings of the data, over scale."""
    found = dimension_curve(torch.cat([embed(loaded, batch) for batch in batches]).float())
    return Panel(
        title="Dimension of the embeddings",
        words=f"{found.verdict} {found.n:,} embeddings in {found.features} dimensions.",
        findings=tuple(readings[0] for readings in found.curves.values()),
        curves={name: tuple(line) for name, line in dimension_curves(found).items()},
        x="points (more of them look closer)",
        y="dimension",
    )


def losses_of(loaded: LoadedModel, batches: Sequence[Batch]) -> list[ModelLoss]:
    """The loss that the model was trained with, on CURVATURE_ROWS rows; empty where it cannot be known.

    Batches with labels have the model's own loss; causal language models predict the next token.
    """
    losses: list[ModelLoss] = []
    rows = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or rows >= CURVATURE_ROWS:
            break
        first = next(iter(batch.values()))
        kept = {name: value[: CURVATURE_ROWS - rows] for name, value in batch.items()}
        rows += min(len(first), CURVATURE_ROWS - rows)
        if "labels" in kept:
            losses.append(partial(_own_loss, batch=kept))
        elif loaded.task == "causal-lm" and "input_ids" in kept:
            losses.append(partial(_next_token, batch=kept))
    return losses


def too_large(model: nn.Module) -> str:
    """Why the curvature is not measured, or an empty text: Lanczos keeps CURVATURE_STEPS vectors of all parameters."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = size * CURVATURE_STEPS * 4
    if needed <= CURVATURE_BYTES:
        return ""
    return f"Lanczos would take {needed / 2**30:.1f} GiB for {size:,} parameters, more than {CURVATURE_BYTES >> 30} GiB"


def curvature_panel(model: nn.Module, losses: Sequence[ModelLoss], seed: int = 0) -> Panel:
    """The density of the Hessian's eigenvalues, its largest one, its trace, and the step sizes that they allow."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        found = hessian_spectrum(model, losses, steps=CURVATURE_STEPS, probes=CURVATURE_PROBES, seed=seed)
    figures = found.figures()
    top = figures["top_eigenvalue"]
    limits = []
    if top.value is not None and top.value > 0:
        spread = None if top.uncertainty is None else 2 * top.uncertainty / top.value**2
        limits = [replace(top, name="gd_max_learning_rate", value=2 / top.value, uncertainty=spread, details={})]
    # The density as the share of eigenvalues beyond each size: nearly all of them lie at zero.
    nodes = torch.cat([run.nodes for run in found.runs])
    reach = float(nodes.abs().max()) or 1.0
    points = torch.logspace(-4, 0, DENSITY_POINTS, dtype=torch.float64) * reach
    above = 1 - found.cumulative(points)
    below = found.cumulative(-points)
    curves = {"positive": _line(points, above), "negative": _line(points, below)}
    return Panel(
        title="Curvature",
        words="Share of the eigenvalues of the Hessian of the loss that are larger in size than each value, by "
        "stochastic Lanczos quadrature; both axes are logarithmic. Gradient descent stays at a minimum only with a "
        "learning rate of at most 2/λmax.",
        findings=(top, figures["trace"], figures["negative_share"], *limits),
        curves={name: line for name, line in curves.items() if len(line) > 1},
        x="|eigenvalue|",
        y="share beyond",
    )


def change_panel(matrices: Sequence[MatrixFacts], finding: str, y: str) -> Panel | None:
    """What changed against the base, by depth: one line per role of ``finding``."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for facts in matrices:
        measured = facts.findings.get(finding)
        if facts.depth is not None and measured is not None and measured.value is not None:
            curves.setdefault(facts.role or facts.name, []).append((facts.depth, measured.value))
    if not curves:
        return None
    return Panel(
        title="Change against the base",
        words="Of each weight’s difference ΔW to the base, by block.",
        findings=(),
        curves={role: tuple(sorted(line)) for role, line in curves.items()},
        x="block",
        y=y,
    )


def _line(points: Tensor, shares: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in zip(points.tolist(), shares.tolist(), strict=True) if y > 1e-12)


def _own_loss(model: nn.Module, *, batch: Mapping[str, Any]) -> Tensor:
    """What the model itself makes of the labels."""
    loss: Tensor = model(**batch).loss
    return loss


def _next_token(model: nn.Module, *, batch: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy of the next token, padding left out."""
    logits = model(**batch).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
