r"""Gaussian universality: whether a linear classifier errs on data as it does on Gaussians with the same moments.

*What it does.* Compares the error of a linear classifier on samples of several classes with its error on a Gaussian
surrogate that has the same means and covariances per class. Where they agree, the data hold nothing beyond two
moments that a linear model could use or suffer from; images made by diffusion models are reported to be like that.

*Formula.* Surrogate of class c: m_c + S_c^½ g, g ~ N(0, I), m_c and S_c the sample's mean and covariance. Classifier:
least squares on one-hot labels, the class of the largest output, cross-validated. Value: error on the samples − error
on the surrogates.

*Cost.* folds · (draws + 1) least-squares fits of n d² multiply-adds.

*When it does not help.* Means and covariances are fitted on the same rows, and with few rows a feature their noise
makes the surrogate too easy. So data are first projected onto the leading min(D, n_min / 10) principal directions,
n_min the size of the smallest class: what lies beyond is not checked. Errors near 0 agree for any data. A difference
near 0 says nothing about other models: nets do use higher moments.

*Departs from the paper in.* Least squares where the paper trains a generalised linear model by gradient descent; the
projection; an interval for the difference.

*Reference.* R. Ghane, A. Bao, D. Akhtiamov, B. Hassibi, “Concentration of Measure for Distributions Generated via
Diffusion Models” (later: “Gaussian Universality for Diffusion Models”), 2025, https://arxiv.org/abs/2501.07741.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> labels = torch.arange(600) % 2
>>> X = torch.randn(600, 8, generator=generator, dtype=torch.float64) + labels[:, None] * 0.5
>>> found = gaussian_universality(X, labels)
>>> abs(found.value) < 2 * found.uncertainty
True
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.geometry.points import NORMAL_95, as_points
from eckart.linalg import symmetric_root
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

ROWS_PER_FEATURE = 10
"""Rows of the smallest class for each principal direction that is kept."""
NAME = "gaussian_universality"


def gaussian_universality(X: Tensor, y: Tensor, *, folds: int = 5, draws: int = 4, seed: int = 0) -> Finding:
    """Error of a linear classifier on X (n, D), y (n,) less that on Gaussian surrogates, with a 95 % interval.

    ``y`` are classes, integers or booleans. ``folds`` ≥ 2 parts of the cross-validation, ``draws`` ≥ 1 surrogates,
    ``seed`` for both. The interval is binomial; it leaves out the luck of the training rows. ``details``: ``error``,
    ``gaussian_error``, ``features`` kept. Value None for one class, a class with fewer than `ROWS_PER_FEATURE` rows and
    constant data. Raises InputError for labels that are no integers or do not fit, and options out of range,
    NotFiniteError for NaN and Inf.
    """
    points = as_points(X, NAME)
    _check(points, y, folds, draws)
    _, labels, counts = torch.unique(y.cpu(), return_inverse=True, return_counts=True)
    n, classes = points.shape[0], counts.numel()
    least = int(counts.min())
    reason = ""
    if classes < 2:
        reason = "one class only"
    elif least < max(ROWS_PER_FEATURE, folds):
        reason = f"the smallest class has {least} rows, of at least {max(ROWS_PER_FEATURE, folds)}"
    elif bool((points == points[0]).all()):
        reason = "all rows are equal"
    if reason:
        return Finding(name=NAME, value=None, n=n, notes=(reason,))
    kept = min(points.shape[1], least // ROWS_PER_FEATURE)
    notes: tuple[str, ...] = ()
    if kept < points.shape[1]:
        centred = points - points.mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:kept]
        points = centred @ directions.T
        share = float(points.square().sum() / centred.square().sum())
        notes = (f"checked on {kept} principal directions, {share:.0%} of the variance",)
    generator = torch.Generator().manual_seed(seed)
    error = _error(points, labels, folds, generator)
    gaussian = (
        sum(_error(_surrogate(points, labels, generator), labels, folds, generator) for _ in range(draws)) / draws
    )
    variance = error * (1 - error) / n + gaussian * (1 - gaussian) / (n * draws)
    return Finding(
        name=NAME,
        value=error - gaussian,
        uncertainty=NORMAL_95 * math.sqrt(max(variance, 1 / n**2)),
        n=n,
        notes=notes,
        details={"error": error, "gaussian_error": gaussian, "features": kept, "classes": classes},
    )


def _surrogate(points: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian row for every row, with the mean and covariance of its class."""
    drawn = torch.empty_like(points)
    for c in range(int(labels.max()) + 1):
        rows = points[labels == c]
        mean = rows.mean(0)
        root, _ = symmetric_root((rows - mean).T @ (rows - mean) / (rows.shape[0] - 1))
        drawn[labels == c] = mean + torch.randn(rows.shape, generator=generator, dtype=points.dtype) @ root
    return drawn


def _error(points: Tensor, labels: Tensor, folds: int, generator: torch.Generator) -> float:
    """Share of rows that least squares, fitted on the other folds, puts into a wrong class; folds keep class shares."""
    n = points.shape[0]
    order = torch.randperm(n, generator=generator)
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(n) % folds
    targets = torch.nn.functional.one_hot(labels).to(points)
    wrong = 0
    for part in range(folds):
        train, test = fold != part, fold == part
        mean, offset = points[train].mean(0), targets[train].mean(0)
        A = points[train] - mean
        gram = A.T @ A
        ridge = 1e-10 * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)  # collinear features
        B = torch.linalg.solve(gram + ridge, A.T @ (targets[train] - offset))
        predicted = ((points[test] - mean) @ B + offset).argmax(1)
        wrong += int((predicted != labels[test]).sum())
    return wrong / n


def _check(points: Tensor, y: Tensor, folds: int, draws: int) -> None:
    found = []
    if not isinstance(y, Tensor) or y.shape != (points.shape[0],) or y.is_floating_point() or y.is_complex():
        got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        found.append(f"y holds a class, an integer, for each of {points.shape[0]} rows; got {got}")
    found += [
        f"{name} is an int of at least {least}; got {value!r}"
        for name, value, least in (("folds", folds, 2), ("draws", draws, 1))
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]
    if found:
        raise InputError(problems(NAME, found))


def _claim_samples(heavy: bool) -> tuple[Tensor, Tensor]:
    """4000 rows of two classes in 30 features: from a random two-layer ReLU net, or Gaussians with one Student-t
    scale."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    shift = 0.25 * (2 * labels[:, None] - 1)
    if heavy:
        chi = torch.randn(4000, 3, generator=generator, dtype=torch.float64).square().sum(1, keepdim=True)
        X = torch.randn(4000, 30, generator=generator, dtype=torch.float64) * chi.rsqrt() + shift
    else:
        latent = torch.randn(4000, 100, generator=generator, dtype=torch.float64) + shift
        hidden = latent @ torch.randn(100, 200, generator=generator, dtype=torch.float64) / 10
        X = hidden.relu() @ torch.randn(200, 30, generator=generator, dtype=torch.float64) / 14
    return X, labels


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for name, heavy in (("generated by a net", False), ("heavy-tailed", True)):
        found = gaussian_universality(*_claim_samples(heavy))
        figures |= {
            f"{name}: error": float(found.details["error"]),
            f"{name}: of Gaussians": found.details["gaussian_error"],
        }
        differs = abs(float(found)) > float(found.uncertainty or 0.0)
        held = held and differs is heavy
    return Verdict(held=held, figures=figures)


METHOD = Diagnostic(
    name="gaussian-universality",
    summary="linear classifiers on samples against Gaussians with the same means and covariances",
    group="data",
    paper=Paper(
        authors="R. Ghane, A. Bao, D. Akhtiamov, B. Hassibi",
        title="Concentration of Measure for Distributions Generated via Diffusion Models",
        year=2025,
        link="https://arxiv.org/abs/2501.07741",
    ),
    entry=gaussian_universality,
    claim=Claim(
        statement="Samples made by a net from Gaussian noise give a linear classifier the error of Gaussians with "
        "their moments; heavy-tailed samples do not.",
        source="Ghane et al. 2025: universality of generated data; heavy tails are out of reach of such models",
        run=_run_claim,
    ),
)
