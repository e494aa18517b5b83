r"""Stability margins: how far the learning rate is from throwing gradient descent, or SGD, out of a minimum.

*What it does.* Sets the curvature at a minimum against the learning rate. A margin above 1 says that the condition
holds; below 1 that the optimizer cannot stay there.

*Formula.* Near a minimum with Hessian H, gradient descent multiplies the error by I − ηH: it stays iff λ_max ≤ 2/η.
SGD at a minimum that fits every sample (the loss of each has zero gradient there and a Hessian H_i ⪰ 0 of rank ≤ c, the
number of outputs per sample) with batches of B drawn independently: the second moment of the error goes by
M ↦ E[(I − ηH_b) M (I − ηH_b)], a positive and self-adjoint map T. Its spectral radius is at least ⟨I, T I⟩/⟨I, I⟩, so
stability in the mean square needs η E‖H_b‖_F² ≤ 2 tr H. With E‖H_b‖_F² = E‖H_i‖_F²/B + (1 − 1/B)‖H‖_F² and
E‖H_i‖_F² ≥ (E tr H_i)²/c = (tr H)²/c it needs

    κ_B = tr H/(cB) + (1 − 1/B) ‖H‖_F²/tr H ≤ 2/η.

B = c = 1 is the paper's tr H ≤ 2/η. In the mean SGD goes like gradient descent, so λ_max ≤ 2/η is needed too:
margins are 2/(η λ_max) and 2/(η max(κ_B, λ_max)).

*Cost.* One :func:`eckart.landscape.spectrum`: 2 · steps · probes gradients.

*When it does not help.* Far from a minimum: the conditions are of the quadratic around it (the bottom eigenvalue is
looked at, and a note says so). Training in fact hovers at λ_max ≈ 2/η (the edge of stability), so a margin of 1 is
no alarm. For SGD they are necessary, not sufficient, and only exact where all samples have the same tr H_i; and
instability of the mean square can be due to rare samples. For minima that do not fit every sample, momentum, or Adam
(whose preconditioner changes H) they say nothing.

*Departs from the paper in.* The paper states tr H ≤ 2/η for linearly stable global minima; the proof above, with
batches and several outputs, was derived here, and gives the paper's condition for B = c = 1. With larger batches its
condition is weaker than the paper's.

*Reference.* L. Wu, W. J. Su, “The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent”, 2023,
https://arxiv.org/abs/2305.17490; L. Wu, C. Ma, W. E, “How SGD Selects the Global Minima in Over-parameterized Learning:
A Dynamical Stability Perspective”, 2018.

*Example.*

>>> import torch
>>> from eckart.landscape import matrix_operator
>>> H = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
>>> found = stability(matrix_operator(H), learning_rate=0.25)
>>> {name: round(float(finding), 6) for name, finding in found.items()}  # doctest: +NORMALIZE_WHITESPACE
{'gd_margin': 2.0, 'sgd_margin': 0.8, 'gd_max_learning_rate': 0.5, 'sgd_max_learning_rate': 0.2}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from eckart.errors import InputError, problems
from eckart.landscape.curvature import ModelLoss, Operator, model_hessian
from eckart.landscape.lanczos import Spectrum, spectrum
from eckart.landscape.probes import interval
from eckart.landscape.trial import byte_kinds
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


def stability(
    operator: Operator,
    learning_rate: float,
    *,
    batch_size: int = 1,
    outputs: int = 1,
    steps: int = 80,
    probes: int = 8,
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> dict[str, Finding]:
    """``gd_margin``, ``sgd_margin`` and the largest learning rates, for the Hessian at a minimum as an operator.

    ``batch_size`` and ``outputs`` (numbers that the loss of one sample depends on; classes for a classifier) belong to
    SGD. A margin is None, with the reason, where its curvature is not positive. Raises InputError for a learning rate
    that is not positive or counts below 1, and what :func:`eckart.landscape.spectrum` raises.
    """
    wrong = []
    if not isinstance(learning_rate, (int, float)) or not math.isfinite(learning_rate) or learning_rate <= 0:
        wrong.append(f"learning_rate is a positive number; got {learning_rate!r}")
    for name, value in (("batch_size", batch_size), ("outputs", outputs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            wrong.append(f"{name} is an int of at least 1; got {value!r}")
    if wrong:
        raise InputError(problems("stability", wrong))
    found = spectrum(operator, steps=steps, probes=probes, seed=seed, notes=notes)
    figures = found.figures()
    top, bottom = figures["top_eigenvalue"], figures["bottom_eigenvalue"]
    if float(bottom) < -max(1e-3 * abs(float(top)), bottom.uncertainty or 0.0):
        notes = (*notes, f"not a minimum: the smallest eigenvalue is {float(bottom):.3g} (largest {float(top):.3g})")
    noisy = _noisy_curvature(found, batch_size, outputs)
    if noisy.value is not None and top.value is not None and noisy.value < top.value:
        noisy = top
    rates = {
        "gd": _rate("gd_max_learning_rate", top, "largest eigenvalue", notes),
        "sgd": _rate("sgd_max_learning_rate", noisy, "trace", notes),
    }
    margins = {f"{name}_margin": _margin(f"{name}_margin", rate, learning_rate) for name, rate in rates.items()}
    return margins | {f"{name}_max_learning_rate": rate for name, rate in rates.items()}


def stability_margins(
    model: nn.Module,
    loss: ModelLoss | Sequence[ModelLoss],
    learning_rate: float,
    *,
    batch_size: int = 1,
    outputs: int = 1,
    steps: int = 80,
    probes: int = 8,
    seed: int = 0,
) -> dict[str, Finding]:
    """:func:`stability` of a model at its present parameters; ``loss`` as in :func:`eckart.landscape.hessian_spectrum`.

    ``loss`` is the full-batch loss (or a sequence of batches), in the scale in which it is trained.
    """
    operator, notes = model_hessian(model, loss)
    return stability(
        operator,
        learning_rate,
        batch_size=batch_size,
        outputs=outputs,
        steps=steps,
        probes=probes,
        seed=seed,
        notes=notes,
    )


def _noisy_curvature(found: Spectrum, batch_size: int, outputs: int) -> Finding:
    """κ_B, with the interval of its linearisation in tr H and ‖H‖_F² over the probes."""
    traces = [run.quadratic for run in found.runs]
    squares = [run.square_norm * float(run.weights @ run.nodes.square()) for run in found.runs]
    trace, square = sum(traces) / len(traces), sum(squares) / len(squares)
    if trace <= 0:
        return Finding(name="curvature", value=None, n=len(traces))
    rest = 1 - 1 / batch_size
    values = [
        t / (outputs * batch_size) + rest * (s / trace - square * (t - trace) / trace**2)
        for t, s in zip(traces, squares, strict=True)
    ]
    return interval("curvature", values)


def _rate(name: str, curvature: Finding, what: str, notes: tuple[str, ...]) -> Finding:
    """2 / curvature."""
    if curvature.value is None or curvature.value <= 0:
        reason = f"the {what} of the Hessian is not positive: this is no minimum"
        return Finding(name=name, value=None, n=curvature.n, notes=(reason, *notes))
    value = 2 / curvature.value
    spread = None if curvature.uncertainty is None else value * curvature.uncertainty / curvature.value
    return Finding(
        name=name,
        value=value,
        uncertainty=spread,
        n=curvature.n,
        notes=notes,
        details={"curvature": curvature.value},
    )


def _margin(name: str, rate: Finding, learning_rate: float) -> Finding:
    if rate.value is None:
        return replace(rate, name=name)
    value = rate.value / learning_rate
    spread = None if rate.uncertainty is None else rate.uncertainty / learning_rate
    notes = rate.notes
    if spread is not None and abs(value - 1) <= spread:
        notes = (*notes, "1 lies inside of the interval: on which side cannot be told")
    return replace(rate, name=name, value=value, uncertainty=spread, notes=notes)


CLAIM_STEPS = 4000


def _descended(H: Tensor, start: Tensor, rate: float) -> float:
    """‖δ‖ after 400 steps of gradient descent, as a multiple of where it began."""
    delta = start
    for _ in range(400):
        delta = delta - rate * (H @ delta)
    return float(delta.norm() / start.norm())


def _sampled(X: Tensor, start: Tensor, rate: float) -> float:
    """‖δ‖ after 4000 steps of SGD on (xᵀδ)²/2 with one row of X each, as a multiple of where it began."""
    order = torch.randint(0, X.shape[0], (CLAIM_STEPS,), generator=torch.Generator().manual_seed(0))
    delta = start
    for x in X[order]:
        delta = delta - rate * x * (x @ delta)
    return float(delta.norm() / start.norm())


def _run_claim() -> Verdict:
    # Contexts of ±1 bits, so that every sample has ‖x‖² = 64 = tr H, and targets that a linear map fits.
    X = byte_kinds(200, 0)[0].double()
    H = X.T @ X / X.shape[0]
    start = torch.linalg.pinv(X) @ X.sum(1)  # in the span of the rows
    top, trace = float(torch.linalg.eigvalsh(H)[-1]), float(H.trace())
    figures = {"largest eigenvalue": top, "trace": trace}
    for share in (0.95, 1.05):
        figures[f"SGD at {share} × 2/tr H"] = _sampled(X, start, share * 2 / trace)
        figures[f"GD at {share} × 2/tr H"] = _descended(H, start, share * 2 / trace)
        figures[f"GD at {share} × 2/λmax"] = _descended(H, start, share * 2 / top)
    held = (
        max(figures["SGD at 0.95 × 2/tr H"], figures["GD at 1.05 × 2/tr H"], figures["GD at 0.95 × 2/λmax"]) < 1
        and min(figures["SGD at 1.05 × 2/tr H"], figures["GD at 1.05 × 2/λmax"]) > 1
    )
    return Verdict(
        held=held,
        figures=figures,
        note="distance from the minimum as a multiple of the start; linear regression on bits of source text, batch 1",
    )


METHOD = Diagnostic(
    name="stability-margins",
    summary="learning rate against curvature: 2/λmax for gradient descent, 2/tr H for SGD",
    group="landscape",
    paper=Paper(
        authors="L. Wu, W. J. Su",
        title="The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent",
        year=2023,
        link="https://arxiv.org/abs/2305.17490",
    ),
    entry=stability_margins,
    claim=Claim(
        statement="On linear regression with samples of equal norm, SGD stays at the minimum for η = 0.95 · 2/tr H and "
        "leaves it for 1.05 · 2/tr H, where gradient descent stays; that one leaves between 0.95 and 1.05 · 2/λmax.",
        source="abstract: SGD's linear stability needs tr H ≤ 2/η, GD's only bounds the largest eigenvalue",
        run=_run_claim,
    ),
)
