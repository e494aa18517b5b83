r"""MMCR gauge: how much of the possible manifold capacity a set of views uses.

*What it does.* Takes several views of each object (augmentations, tokens of a sentence, frames of a scene), all
embedded, and says how near the centroids of the objects come to the spread that is possible at all: 100 % where all
views of an object coincide and the objects are as orthogonal as the dimension lets them be.

*Formula.* z of unit length, B objects with V views each in d dimensions, C (B × d) the means over views. The gauge is
‖C‖_* / √(min(B, d)·B): since ‖c_b‖ ≤ 1, ‖C‖_* ≤ √rank · ‖C‖_F ≤ √min(B, d) · √B. It is reached where every ‖c_b‖ = 1
and the singular values of C are equal. Loss: λ · mean_b ‖Z_b‖_* − ‖C‖_*, with λ = 0 in the paper.

*Cost.* One SVD of B × d, and B of V × d for the spread of the views.

*When it does not help.* As a score of how good an embedding is for a task: it knows nothing of labels, and random
but distinct codes, the same for all views, reach it too. Figures at different B, d or V cannot be compared: with few
views the centroids of noise are long (‖c_b‖ ≈ 1/√V). ``details["noise"]`` is what noise scores with as many views.

*Departs from the paper in.* The paper maximises ‖C‖_*; the division by the bound is ours, the bound is in
Schaeffer et al. too. Two or more views are asked for: with one, every object is its own centroid.

*Reference.* T. Yerxa, Y. Kuang, E. Simoncelli, S. Chung, “Learning efficient coding of natural images with maximum
manifold capacity representations”, NeurIPS 2023, https://arxiv.org/abs/2303.03307; R. Schaeffer et al., “Towards an
improved understanding and utilization of maximum manifold capacity representations”, 2024.

*Example.*

>>> import torch
>>> orthogonal = torch.eye(8, dtype=torch.float64)[:, None].expand(8, 3, 8)  # 8 objects, 3 equal views
>>> round(float(mmcr_gauge(orthogonal)), 6)
100.0
>>> round(float(mmcr_gauge(torch.ones(8, 3, 8))), 2)  # all at one place: √8 / 8
35.36
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


def mmcr_gauge(views: Tensor) -> Finding:
    """Finding ``mmcr``: the nuclear norm of the centroids in per cent of its bound, from 0 to 100.

    ``views``: (objects, views, features), two views or more; scaled to unit length here. ``details``: ``centroid``,
    mean length of a centroid (1: all views coincide), ``within``, mean ‖Z_b‖_* from √V (all views the same) to
    √(V·min(V, d)), and ``noise``, the gauge of Gaussian noise of the same shape (one draw, seed 0).

    Raises InputError for other shapes, a single view and views of length 0; NotFiniteError for NaN or Inf.
    """
    Z = _unit(real_tensor(views, "views", "objects × views × features"))
    B, V, d = Z.shape
    if V < 2:
        raise InputError("views: expected two views or more of each object; got 1, which is its own centroid.")
    noise = _unit(torch.randn(Z.shape, generator=torch.Generator().manual_seed(0), dtype=Z.dtype))
    return Finding(
        name="mmcr",
        value=_gauge(Z),
        uncertainty=0.0,
        n=B,
        unit="%",
        notes=(f"{B} objects in {d} dimensions: the bound is set by the {'objects' if d > B else 'dimensions'}",),
        details={
            "nuclear_norm": float(torch.linalg.matrix_norm(Z.mean(1), "nuc")),
            "bound": math.sqrt(min(B, d) * B),
            "centroid": float(Z.mean(1).norm(dim=1).mean()),
            "within": float(torch.linalg.matrix_norm(Z, "nuc").mean()),
            "noise": _gauge(noise),
            "views": V,
        },
    )


def mmcr_loss(views: Tensor, *, within: float = 0.0) -> Tensor:
    """λ · mean ‖Z_b‖_* − ‖C‖_* with λ = ``within``, a differentiable scalar in the dtype of ``views`` (B, V, d)."""
    Z = torch.nn.functional.normalize(views, dim=-1)
    loss: Tensor = -torch.linalg.matrix_norm(Z.mean(1), "nuc")
    if within:
        loss = loss + within * torch.linalg.matrix_norm(Z, "nuc").mean()
    return loss


def _unit(Z: Tensor) -> Tensor:
    lengths = Z.norm(dim=-1, keepdim=True)
    if empty := int((lengths == 0).sum()):
        raise InputError(f"views: {empty} views have length 0 and no direction; drop them.")
    unit: Tensor = Z / lengths
    return unit


def _gauge(Z: Tensor) -> float:
    B, _, d = Z.shape
    return 100 * float(torch.linalg.matrix_norm(Z.mean(1), "nuc")) / math.sqrt(min(B, d) * B)


CLAIM_OBJECTS, CLAIM_VIEWS, CLAIM_FEATURES, CLAIM_STEPS = 32, 8, 12, 300


def _run_claim() -> Verdict:
    """A linear map of noisy views in 40 dimensions to 12, trained on −‖C‖_* alone."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(CLAIM_OBJECTS, 1, 40, generator=generator, dtype=torch.float64)
    noise = torch.randn(CLAIM_OBJECTS, CLAIM_VIEWS, 40, generator=generator, dtype=torch.float64)
    noise[..., 20:] *= 3  # half of the dimensions say little about the object
    x = objects + noise * 0.5
    W = (torch.randn(CLAIM_FEATURES, 40, generator=generator, dtype=torch.float64) / 40**0.5).requires_grad_()
    optimiser = torch.optim.Adam([W], lr=1e-2)
    before = mmcr_gauge(x @ W.detach().T)
    for _ in range(CLAIM_STEPS):
        loss = mmcr_loss(x @ W.T)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    after = mmcr_gauge(x @ W.detach().T)
    figures = {
        "gauge before, %": float(before),
        "gauge after, %": float(after),
        "mean ‖Z_b‖_* before": before.details["within"],
        "mean ‖Z_b‖_* after": after.details["within"],
        "least possible ‖Z_b‖_*": math.sqrt(CLAIM_VIEWS),
    }
    held = float(after) > float(before) and after.details["within"] < before.details["within"]
    return Verdict(held=held, figures=figures, note="λ = 0: nothing in the loss asks for compact objects")


METHOD = Diagnostic(
    name="mmcr",
    summary="how much of the possible manifold capacity the views of a set of objects use, 0 to 100 %",
    group="representations",
    paper=Paper(
        authors="T. Yerxa, Y. Kuang, E. Simoncelli, S. Chung",
        title="Learning efficient coding of natural images with maximum manifold capacity representations",
        year=2023,
        link="https://arxiv.org/abs/2303.03307",
    ),
    entry=mmcr_gauge,
    claim=Claim(
        statement="Maximising the nuclear norm of the centroids alone also makes the objects compact: the mean "
        "nuclear norm of the views of an object falls, though the loss does not contain it.",
        source="the choice λ = 0: maximising the global term compresses the object manifolds by itself",
        run=_run_claim,
    ),
)
