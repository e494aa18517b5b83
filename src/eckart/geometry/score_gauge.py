r"""The gauge of a score: how far a vector field is from being a gradient.

*What it does.* A diffusion model learns a vector field and calls it the score. A true score is the gradient of the
log-density, so its Jacobian is symmetric; a net is free to add a part that is not. Densities and samples may survive
that, readings of local dimension do not. This measures the part.

*Formula.* ‖J − Jᵀ‖_F / ‖J + Jᵀ‖_F, J = ∂score/∂x, with ‖A‖_F² = E‖A v‖² over Rademacher v: J v by forward, Jᵀ v by
reverse differentiation. 0: a gradient, 1: as much rotation as gradient (a J without any symmetry), ∞: nothing but
rotation.

*Cost.* One forward-mode and one reverse-mode pass for each of ``probes`` vectors, over all points at once.

*When it does not help.* The ratio is global over directions: a small antisymmetric part in the few tangent directions
is drowned by the large symmetric one in the normal directions at small noise. A symmetric Jacobian does not make the
score right. The model must treat rows independently (no batch statistics) and know forward-mode differentiation.

*Departs from the paper in.* The paper splits the field by theory and constrains nets; the ratio is the check that
follows.

*Reference.* C. Horvat, J.-P. Pfister, “On gauge freedom, conservativity and intrinsic dimensionality estimation in
diffusion models”, 2024, https://arxiv.org/abs/2402.03845.

*Example.*

>>> import torch
>>> A = torch.tensor([[-2.0, 1.0], [-1.0, -2.0]])  # a gradient and a rotation
>>> found = score_gauge(lambda x: x @ A.T, torch.zeros(3, 2))
>>> round(found.value, 4)
0.5
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from eckart.errors import InputError, NotFiniteError, problems
from eckart.geometry.points import NORMAL_95, as_points
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


def score_gauge(score: Callable[[Tensor], Tensor], x: Tensor, *, probes: int = 16, seed: int = 0) -> Finding:
    """‖J − Jᵀ‖ / ‖J + Jᵀ‖ of ``score`` over the points x (m, D), with the 95 % interval of the probes.

    ``score`` takes (m, D) to (m, D), each row by itself, and can be differentiated in forward mode; it gets x's dtype
    and device. ``probes`` ≥ 2 vectors at every point. Value None where the Jacobian has no symmetric part, a zero one
    included. Raises InputError for options out of range and a score of the wrong shape, NotFiniteError for NaN and
    Inf in x or derivatives.
    """
    m, D = as_points(x, "score_gauge").shape
    found = []
    if not x.is_floating_point():
        found.append(f"x is in the model's dtype, floating point; got {x.dtype}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
        found.append(f"probes is an int of at least 2; got {probes!r}")
    if found:
        raise InputError(problems("score_gauge", found))
    generator = torch.Generator().manual_seed(seed)
    x = x.detach()
    output, pull = vjp(score, x)[:2]
    if output.shape != x.shape:
        raise InputError(f"score_gauge: score takes (m, D) to (m, D), here {(m, D)}; it gave {tuple(output.shape)}.")
    rotations, gradients = [], []
    for _ in range(probes):
        v = (2 * torch.randint(0, 2, (m, D), generator=generator) - 1).to(x)
        Jv, JTv = jvp(score, (x,), (v,))[1], pull(v)[0]
        rotations.append((Jv - JTv).detach().double().square().sum(1))
        gradients.append((Jv + JTv).detach().double().square().sum(1))
    a, s = torch.stack(rotations).cpu(), torch.stack(gradients).cpu()  # (probes, m)
    if not bool((a.isfinite() & s.isfinite()).all()):
        raise NotFiniteError("score_gauge: NaN or Inf in the derivatives of the score.")
    if float(s.sum()) == 0:
        reason = "the Jacobian is zero" if float(a.sum()) == 0 else "the Jacobian has no symmetric part"
        return Finding(name="score_gauge", value=None, n=m, notes=(reason,))
    value = float((a.sum() / s.sum()).sqrt())
    error = float(((a - value**2 * s).mean(1) / s.mean()).std()) / math.sqrt(probes)  # of value²
    return Finding(
        name="score_gauge",
        value=value,
        uncertainty=NORMAL_95 * min(error / (2 * value), math.sqrt(error)) if value > 0 else 0.0,
        n=m,
        details={"probes": probes},
    )


def _learned_score(sigma: float) -> tuple[nn.Module, Tensor]:
    """A small net trained by denoising on a noised circle in three dimensions, and points of that data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3)).double()
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(400):
            angle = 2 * math.pi * torch.rand(256, dtype=torch.float64)
            clean = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
            noise = torch.randn(256, 3, dtype=torch.float64)
            loss = (net(clean + sigma * noise) + noise).square().mean()  # net = σ · score
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net, (clean + sigma * noise).detach()


def _run_claim() -> Verdict:
    sigma = 0.3
    net, points = _learned_score(sigma)
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)

    def true_score(x: Tensor) -> Tensor:
        weights = (x @ circle.T / sigma**2).softmax(1)  # all points of the circle have one norm
        return (weights @ circle - x) / sigma**2

    true, learned = score_gauge(true_score, points), score_gauge(net, points)
    figures = {"exact score": float(true), "learned score": float(learned)}
    return Verdict(
        held=float(true) < 1e-8 and float(learned) - float(learned.uncertainty or 0.0) > 0.01,
        figures=figures,
        note="a circle in 3 features with noise of std 0.3",
    )


METHOD = Diagnostic(
    name="score-gauge",
    summary="how far the score of a diffusion model is from being a gradient",
    group="data",
    paper=Paper(
        authors="C. Horvat, J.-P. Pfister",
        title="On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models",
        year=2024,
        link="https://arxiv.org/abs/2402.03845",
    ),
    entry=score_gauge,
    claim=Claim(
        statement="The Jacobian of an exact score is symmetric; a net trained by denoising on the same data has an "
        "antisymmetric part of more than 1 %.",
        source="Horvat and Pfister 2024: nets trained without a constraint are not conservative",
        run=_run_claim,
    ),
)
