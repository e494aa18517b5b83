r"""Learning rate against batch size: how much sharper than the full loss a batch looks.

*What it does.* The Hessian of a batch is that of all data plus noise, and noise adds curvature. From the largest
eigenvalue λ and the noise of the entries, both measured, it predicts the largest eigenvalue λ′ that batches of size b
show, and with it the largest stable learning rate as a function of b.

*Formula.* H_b = H + E with entries of E of variance s²/b (s: standard deviation over samples), D parameters. Where the
entries of E are independent, its spectrum is a semicircle of radius 2s√(D/b), and

    λ′ = λ + (D/b) s²/λ where λ > s√(D/b), else 2s√(D/b)            (law "semicircle")

(b becomes 1/(1/b − 1/N) for batches from N samples without replacement). For Gauss-Newton matrices the noise is
that of a covariance of b samples with noise of standard deviation s per coordinate; with ℓ = λ + s² and γ = D/b

    λ′ = ℓ (1 + γ s²/λ) where λ > s²√γ, else s²(1 + √γ)²             (law "covariance").

The largest stable rate is 2/λ′ for SGD. Adam divides by roughly the root of the curvature, which leaves √λ′: its
largest rate goes as λ′^(−1/2). So rates never fall with b; they stop rising beyond b* = D s²/λ² (semicircle), where
noise and signal are equal.

*Cost.* :func:`learning_rate_by_batch`: ``steps`` products with the Hessian of all data, and ``steps`` + ``probes`` with
that of each batch, whose graphs are kept.

*When it does not help.* It gives the largest stable rate, not the best one. The law takes the entries of the noise for
independent, and those of a real Hessian are not: they share the directions of the curvature itself. On the byte
classifier of the claim batches of 8 show a largest eigenvalue of 11.6 and batches of 32 one of 6.7, where the law
predicts 5.04 and 4.96 from the 4.94 of all data: the rise goes as 1/b, and the law misses nearly all of it. So
:func:`learning_rate_by_batch` takes the form λ(1 + b*/b) from the theory and measures b* on batches; from batches of 32
it then predicts 10.0 at 8. For Adam it is a scaling, and the root of the curvature a heuristic.

*Departs from the paper in.* The paper derives a linear rule for SGD, and a root rule for Adam. The semicircle
law by itself does not give them: d log(1/λ′)/d log b is ½ below b* and b*/(b + b*) ≤ ½ above, so SGD's rate goes as √b
and then flattens; linear it is only where λ + (D/b)s²/λ is used below its own threshold. It is the covariance law
that has 1/λ′ ∝ b for b ≪ D, hence the linear rule for SGD and √b for Adam. Both laws are given, with the curve between
the regimes and not only the power. The second is the classical one of Baik, Ben Arous and Péché. Measuring b* is ours.

*Reference.* D. Granziol, S. Zohren, S. Roberts, “Learning Rates as a Function of Batch Size: A Random Matrix Theory
Approach to Neural Network Training”, 2020, https://arxiv.org/abs/2006.09092; J. Baik, G. Ben Arous, S. Péché, “Phase
transition of the largest eigenvalue for nonnull complex sample covariance matrices”, 2005.

*Example.*

>>> tuple(round(batch_eigenvalue(2.0, 0.1, 1000, b), 3) for b in (1, 10, 100, 1000))
(6.325, 2.5, 2.05, 2.005)
>>> round(scaled_learning_rate(0.1, 64, 256, "sgd"), 3), round(scaled_learning_rate(0.001, 64, 256, "adam"), 4)
(0.4, 0.002)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, problems, unknown
from eckart.landscape.curvature import ModelLoss, Operator, model_hessian
from eckart.landscape.lanczos import lanczos
from eckart.landscape.probes import interval, probe_vectors
from eckart.landscape.trial import byte_kinds, trained_byte_classifier
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

Law = Literal["semicircle", "covariance"]
RateRule = Literal["sgd", "adam"]

POWERS: dict[RateRule, float] = {"sgd": 1.0, "adam": 0.5}
"""The largest learning rate goes as λ′ to minus this power."""


def batch_eigenvalue(
    eigenvalue: float,
    noise: float,
    parameters: int,
    batch_size: float,
    *,
    samples: int | None = None,
    law: Law = "semicircle",
) -> float:
    """λ′, the largest eigenvalue that a batch shows where that of all data is ``eigenvalue``.

    ``noise`` is s: over single samples, the standard deviation of an entry of the Hessian (semicircle), or that of a
    coordinate of the noise of the gradients of the outputs (covariance). ``samples`` is the size N of the data where
    batches are drawn without replacement. Raises InputError for values out of range.
    """
    if law not in ("semicircle", "covariance"):
        raise InputError(unknown("law", str(law), ("semicircle", "covariance")))
    _check_positive("batch_eigenvalue", eigenvalue=eigenvalue, parameters=parameters, batch_size=batch_size)
    if not math.isfinite(noise) or noise < 0:
        raise InputError(f"batch_eigenvalue: noise is a standard deviation, at least 0; got {noise!r}.")
    if samples is not None and law == "covariance":
        raise InputError("batch_eigenvalue: the covariance law is for independent samples; leave samples out.")
    if samples is not None and batch_size > samples:
        raise InputError(f"batch_eigenvalue: a batch of {batch_size:g} does not come from {samples} samples.")
    inverse = 1 / batch_size - (0.0 if samples is None else 1 / samples)
    ratio = max(parameters * inverse, 0.0)
    if law == "semicircle":
        edge = noise * math.sqrt(ratio)
        return eigenvalue + edge**2 / eigenvalue if eigenvalue > edge else 2 * edge
    variance, spike = noise**2, eigenvalue + noise**2
    if eigenvalue > variance * math.sqrt(ratio):
        return spike * (1 + ratio * variance / eigenvalue)
    return variance * (1 + math.sqrt(ratio)) ** 2


def scaled_learning_rate(
    learning_rate: float, from_batch: float, to_batch: float, optimizer: RateRule = "sgd"
) -> float:
    """A rate tuned at one batch size, carried to another: linear in the batch for SGD, its root for Adam.

    The rule for batches far below the critical one; beyond it the rate should not grow. Raises InputError for values
    that are not positive or another optimizer.
    """
    _check_positive("scaled_learning_rate", learning_rate=learning_rate, from_batch=from_batch, to_batch=to_batch)
    if optimizer not in POWERS:
        raise InputError(unknown("optimizer", str(optimizer), POWERS))
    return learning_rate * math.pow(to_batch / from_batch, POWERS[optimizer])


def hessian_noise(
    model: nn.Module,
    losses: Sequence[ModelLoss],
    *,
    batch_size: int,
    probes: int = 4,
    seed: int = 0,
) -> Finding:
    """s, the standard deviation of an entry of the Hessian over samples, averaged over entries.

    ``losses``: the mean losses of disjoint batches of ``batch_size`` samples each. From pairs of batches,
    E‖(H₁ − H₂) v‖² = 2 D² s²/b for Rademacher v. The interval is over pairs; of one pair there is none. Raises
    InputError for fewer than two losses or counts below 1, and what :func:`eckart.landscape.hessian_spectrum` raises.
    """
    _check_positive("hessian_noise", batch_size=batch_size, probes=probes)
    if callable(losses) or len(losses) < 2:
        raise InputError("hessian_noise: expected the losses of at least two batches, as a sequence of functions.")
    pairs = [model_hessian(model, one) for one in losses]
    return _noise([operator for operator, _ in pairs], batch_size, probes, seed, pairs[0][1])


def _noise(operators: Sequence[Operator], batch_size: int, probes: int, seed: int, notes: tuple[str, ...]) -> Finding:
    size = operators[0].size
    squares = []
    for place in range(len(operators) // 2):
        first, second = operators[2 * place], operators[2 * place + 1]
        vectors = probe_vectors(first, probes, seed + place)
        gaps = [float((first.matvec(v) - second.matvec(v)).square().sum()) for v in vectors]
        squares.append(batch_size * sum(gaps) / len(gaps) / (2 * size**2))
    found = interval("hessian_noise", squares)
    value = math.sqrt(float(found))
    spread = found.uncertainty
    return Finding(
        name="hessian_noise",
        value=value,
        uncertainty=None if spread is None else (spread / (2 * value) if value else 0.0),
        n=len(squares),
        unit="per entry of the Hessian",
        notes=(*(("one pair of batches: no interval",) if spread is None else ()), *notes),
    )


def learning_rate_by_batch(
    model: nn.Module,
    loss: ModelLoss,
    batch_losses: Sequence[ModelLoss],
    *,
    batch_size: int,
    batch_sizes: Sequence[int],
    samples: int | None = None,
    steps: int = 30,
    probes: int = 4,
    seed: int = 0,
) -> Finding:
    """The critical batch size b*, and in ``details["curve"]`` the largest stable rate at each of ``batch_sizes``.

    ``loss`` is that of all data, ``batch_losses`` the mean losses of disjoint batches of ``batch_size`` samples, drawn
    from ``samples`` without replacement where that is given. b* is measured, as (m_b − λ)/(u λ) with m_b the mean of
    the batches' largest eigenvalues and u = 1/b or 1/b − 1/N; its interval is over batches. The curve has
    ``eigenvalue`` λ(1 + b* u), ``sgd`` 2/λ′, ``adam`` (relative to the largest batch of the list) and ``law``, the λ′
    that the semicircle law predicts from the noise of the entries (``details["noise"]``). A note says where law and
    measurement contradict each other.

    Raises InputError for fewer than two batches, sizes out of range or a largest eigenvalue that is not positive, and
    what :func:`eckart.landscape.hessian_spectrum` raises.
    """
    wanted = sorted(set(batch_sizes))
    if not wanted:
        raise InputError("learning_rate_by_batch: batch_sizes is empty.")
    _check_positive("learning_rate_by_batch", batch_size=batch_size, smallest_batch=wanted[0], probes=probes)
    if samples is not None and max(batch_size, wanted[-1]) > samples:
        raise InputError(f"learning_rate_by_batch: no batch is larger than the {samples} samples; got {wanted[-1]}.")
    if callable(batch_losses) or len(batch_losses) < 2:
        raise InputError("learning_rate_by_batch: expected the losses of at least two batches.")
    everything, notes = model_hessian(model, loss)
    operators = [model_hessian(model, one)[0] for one in batch_losses]
    noise = _noise(operators, batch_size, probes, seed, notes)
    true = _largest(everything, steps, seed)
    if true <= 0:
        raise InputError(f"learning_rate_by_batch: the largest eigenvalue is {true:.3g}; it has to be positive.")
    unseen = 0.0 if samples is None else 1 / samples
    left = 1 / batch_size - unseen
    if left <= 0:
        raise InputError("learning_rate_by_batch: batches as large as the data show nothing; give smaller ones.")
    found = interval(
        "critical_batch_size",
        [(_largest(operator, steps, seed) / true - 1) / left for operator in operators],
        unit="samples",
    )
    critical = float(found)
    curve = [(b, true * (1 + max(critical, 0.0) * (1 / b - unseen))) for b in wanted]
    s, size, last = float(noise), everything.size, curve[-1][1]
    by_law = size * s**2 / true**2
    if abs(critical - by_law) > max(found.uncertainty or 0.0, 0.5 * max(critical, by_law)):
        notes = (*notes, f"the semicircle law gives {by_law:.3g} instead: the noise of this Hessian is not independent")
    if critical <= 0:
        notes = (*notes, "the batches look no sharper than all data")
    return replace(
        found,
        notes=notes,
        details={
            "eigenvalue": true,
            "noise": s,
            "critical_batch_size_by_law": by_law,
            "parameters": size,
            "curve": [
                {
                    "batch_size": b,
                    "eigenvalue": value,
                    "sgd": 2 / value,
                    "adam": math.sqrt(last / value),
                    "law": batch_eigenvalue(true, s, size, b, samples=samples),
                }
                for b, value in curve
            ],
        },
    )


def _largest(operator: Operator, steps: int, seed: int) -> float:
    """The largest eigenvalue, from one start."""
    return float(lanczos(operator, probe_vectors(operator, 1, seed)[0], steps).nodes[-1])


def _check_positive(what: str, **values: float) -> None:
    wrong = [
        f"{name} is a positive number; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0
    ]
    if wrong:
        raise InputError(problems(what, wrong))


CLAIM_BATCHES = (8, 32, 128, 512)
CLAIM_SIZE = 400
"""Of the symmetric Gaussian matrix."""


def _planted(eigenvalue: float, noise: float, batch_size: int, seed: int) -> float:
    """The largest eigenvalue of a spike in symmetric Gaussian noise of standard deviation ``noise``/√batch_size."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(CLAIM_SIZE, CLAIM_SIZE, generator=generator, dtype=torch.float64)
    E = (A + A.T) / math.sqrt(2) * noise / math.sqrt(batch_size)
    E[0, 0] += eigenvalue
    return float(torch.linalg.eigvalsh(E)[-1])


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for b in (1, 2, 4, 16, 64):  # the threshold is at b* = 400 · 0.2² / 2² = 4
        seen = sum(_planted(2.0, 0.2, b, seed) for seed in range(3)) / 3
        expected = batch_eigenvalue(2.0, 0.2, CLAIM_SIZE, b)
        figures |= {f"planted, batch {b}: seen": seen, f"planted, batch {b}: law": expected}
        held = held and abs(seen / expected - 1) < 0.05
    model, _ = trained_byte_classifier()
    x, y = byte_kinds(4096, 1)
    x = x.double()

    def batch(start: int, size: int) -> ModelLoss:
        return lambda m: cross_entropy(m(x[start : start + size]), y[start : start + size])

    found = learning_rate_by_batch(
        model,
        batch(0, 4096),
        [batch(start, 32) for start in range(0, 512, 32)],
        batch_size=32,
        batch_sizes=CLAIM_BATCHES,
        samples=4096,
    )
    figures |= {"bytes: all data": found.details["eigenvalue"], "bytes: critical batch size": float(found)}
    means = []
    for row in found.details["curve"]:
        size = row["batch_size"]
        starts = range(0, 8 * size, size)
        means.append(
            sum(_largest(model_hessian(model, batch(start, size))[0], 30, 0) for start in starts) / len(starts)
        )
        figures[f"bytes, batch {size}: seen"] = means[-1]
        figures[f"bytes, batch {size}: curve measured at 32"] = row["eigenvalue"]
        figures[f"bytes, batch {size}: law"] = row["law"]
    held = held and means == sorted(means, reverse=True) and means[-1] > figures["bytes: all data"]
    return Verdict(held=held, figures=figures, note="Hessian of a trained byte classifier; means over 8 batches")


METHOD = Diagnostic(
    name="learning-rate-by-batch",
    summary="largest stable learning rate as a function of the batch size, from the noise of the Hessian",
    group="landscape",
    paper=Paper(
        authors="D. Granziol, S. Zohren, S. Roberts",
        title="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
        year=2020,
        link="https://arxiv.org/abs/2006.09092",
    ),
    entry=learning_rate_by_batch,
    claim=Claim(
        statement="A spike in symmetric Gaussian noise moves as the semicircle law says (to 5 %, above and below its "
        "threshold), and the largest eigenvalue of the Hessian of a batch of a real problem lies above that of all "
        "data, the more so the smaller the batch (8, 32, 128, 512 of 4096 samples).",
        source="abstract: extremal values of the batch Hessian are larger than those of the empirical Hessian",
        run=_run_claim,
    ),
)
