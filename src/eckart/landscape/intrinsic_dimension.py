r"""Intrinsic dimension of an objective: how many numbers it takes to reach 90 % of the full performance.

*What it does.* Trains a model inside random subspaces θ = θ₀ + P θ_d of growing dimension d, and finds the least d that
reaches a target, by bisection with repeated seeds: d90.

*Formula.* Only θ_d (d,) is trained, from zero; P (D, d) is random with unit columns
(:mod:`eckart.landscape.projections`). If solutions form a set of dimension D − k, a random subspace of d dimensions
meets it as soon as d ≥ k: k is how many constraints the task puts on the parameters. d90 is the least d whose score is
at least 0.9 times that of full training.

*Cost.* seeds × about log₂(log(upper/lower)/resolution) trainings, and some more where the answer is close; each with
the forward and backward pass of the model plus one projection.

*When it does not help.* It measures model, data, optimizer and learning rate together: a subspace that was trained too
briefly counts as one without a solution, so d90 is an upper bound. Rates that fit full training need not fit
θ_d. A score that does not rise with d (early stopping, overfitting) has no one d90; the notes say where that was
seen. Regularisation acts on θ_d, not on θ. With three seeds it is a rough figure: d90 of the classifier in
the claim below is 48 (dense, interval 18 to 104), 48 (Fastfood, 18 to 62) and 37 (one-hot, 29 to 37) of 1125
parameters, and 62 (23 to 80) of 4485. Those are for accuracy on unseen samples. Accuracy on the training set keeps
rising with d where a model can learn it by heart; a first form of the claim, on 90 % of that, gave 448 and 512 (the end
of the search).

*Departs from the paper in.* Bisection on a geometric grid with a confidence interval, not a sweep read off by eye.
The one-hot projection is later work (K. Li et al., “Uni-LoRA: One Vector is All You Need”, 2025), here dealt out
evenly and with signs; the paper's sparse projection is left out.

*Reference.* C. Li, H. Farkhoor, R. Liu, J. Yosinski, “Measuring the Intrinsic Dimension of Objective Landscapes”, 2018,
https://arxiv.org/abs/1804.08838; Fastfood: Q. Le, T. Sarlós, A. Smola, “Fastfood: Approximating Kernel Expansions in
Loglinear Time”, 2013.

*Example.*

>>> found = find_dimension(lambda d, seed: float(d >= 12), 1, 100, target=0.9)
>>> int(found.value), found.uncertainty, found.details["scores"]["12"]
(12, 0.0, [1.0, 1.0, 1.0])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.stats import t as student
from torch import nn

from eckart.errors import InputError, problems
from eckart.landscape.projections import ProjectionKind, projection
from eckart.landscape.subspace import SubspaceModel
from eckart.landscape.trial import accuracy, byte_kinds, classifier, fit
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

TrainAndScore = Callable[[int, int], float]
"""(dimension, seed) → score, higher is better."""


def geometric_grid(lower: int, upper: int, resolution: float) -> list[int]:
    """Whole numbers from ``lower`` to ``upper``, each at most the factor 1 + ``resolution``, or 1, above the last."""
    grid = [lower]
    while grid[-1] < upper:
        grid.append(min(upper, max(grid[-1] + 1, math.floor(grid[-1] * (1 + resolution)))))
    return grid


def find_dimension(
    train_and_score: TrainAndScore,
    lower: int,
    upper: int,
    *,
    target: float,
    seeds: Sequence[int] = (0, 1, 2),
    resolution: float = 0.1,
) -> Finding:
    """The least d in [lower, upper] whose mean score over ``seeds`` reaches ``target`` (0.9 of the full one for d90).

    ``train_and_score(d, seed)`` trains in d dimensions and returns a score, higher is better; NaN or −Inf counts as
    failed. d is on a grid with steps of the factor 1 + ``resolution`` (or 1). After the bisection the search goes on
    outwards until scores are surely below and surely at the target (95 %, Student's t over the seeds; each d by
    itself): ``details["interval"]`` goes from one above the last d that is surely too small to the first that is
    surely enough, and ``uncertainty`` is the larger way from the value to one of its ends. One seed gives no interval.
    ``at_least`` where even ``upper`` fails. ``details["scores"]`` has every score by dimension.

    Raises InputError for bounds, seeds, target or resolution out of range, or a score that is no number.
    """
    _check_search(lower, upper, target, seeds, resolution)
    grid = geometric_grid(lower, upper, resolution)
    scores: dict[int, list[float]] = {}

    def judged(place: int) -> tuple[bool, bool]:
        """(reached, surely) at this place of the grid."""
        d = grid[place]
        if d not in scores:
            scores[d] = [_score(train_and_score, d, seed) for seed in seeds]
        return _judge(scores[d], target)

    low, high = -1, len(grid)
    if judged(len(grid) - 1)[0]:
        high = len(grid) - 1
        if judged(0)[0]:
            high = 0
        else:
            low = 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if judged(middle)[0] else (middle, high)
    sure_low, sure_high = low, high
    step = 1
    while sure_low > 0 and judged(sure_low) != (False, True):
        sure_low, step = max(sure_low - step, 0), step * 2
    step = 1
    while sure_high < len(grid) - 1 and judged(sure_high) != (True, True):
        sure_high, step = min(sure_high + step, len(grid) - 1), step * 2
    return _report(grid, scores, target, (low, high), (sure_low, sure_high), len(seeds))


def intrinsic_dimension(
    make_model: Callable[[int], nn.Module],
    train_and_score: Callable[[nn.Module, int], float],
    lower: int,
    upper: int,
    *,
    share: float = 0.9,
    kind: ProjectionKind = "fastfood",
    layer_scales: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    resolution: float = 0.1,
) -> Finding:
    """d90 of a model: the least dimension of a random subspace that reaches ``share`` of full training.

    ``make_model(seed)`` gives a fresh model (or a fresh copy of a pretrained one); ``train_and_score(module, seed)``
    trains the parameters of ``module`` that require a gradient and returns a score, higher is better and above 0, such
    as accuracy. It is called with the model itself for the full score, and with it inside a
    :class:`eckart.landscape.SubspaceModel` otherwise; the rate and number of steps are its business. ``layer_scales``
    is SAID. The rest as in :func:`find_dimension`; ``details["full"]`` has the full scores.

    Raises InputError for a share not in (0, 1] or a full score that is not positive, and what
    :func:`find_dimension` and SubspaceModel raise.
    """
    if not 0 < share <= 1:
        raise InputError(f"intrinsic_dimension: share is in (0, 1]; got {share!r}.")
    _check_search(lower, upper, 0.0, seeds, resolution)
    full = [_score(lambda d, seed: train_and_score(make_model(seed), seed), 0, seed) for seed in seeds]
    mean = sum(full) / len(full)
    if not math.isfinite(mean) or mean <= 0:
        raise InputError(f"intrinsic_dimension: full training has to reach a score above 0; got {full}.")

    def in_subspace(d: int, seed: int) -> float:
        inside = SubspaceModel(make_model(seed), d, kind=kind, layer_scales=layer_scales, seed=seed)
        return train_and_score(inside, seed)

    found = find_dimension(in_subspace, lower, upper, target=share * mean, seeds=seeds, resolution=resolution)
    parameters = sum(p.numel() for p in make_model(seeds[0]).parameters() if p.requires_grad)
    details = {**found.details, "full": full, "share": share, "projection": kind, "parameters": parameters}
    return Finding(
        name="intrinsic_dimension",
        value=found.value,
        uncertainty=found.uncertainty,
        n=found.n,
        unit="parameters",
        at_least=found.at_least,
        notes=found.notes,
        details=details,
    )


def _check_search(lower: int, upper: int, target: float, seeds: Sequence[int], resolution: float) -> None:
    wrong = []
    if (
        any(isinstance(value, bool) or not isinstance(value, int) for value in (lower, upper))
        or not 1 <= lower <= upper
    ):
        wrong.append(f"lower and upper are ints with 1 ≤ lower ≤ upper; got {lower!r} and {upper!r}")
    if not math.isfinite(target):
        wrong.append(f"target is a finite score; got {target!r}")
    if len(seeds) < 1 or len(set(seeds)) < len(seeds):
        wrong.append(f"seeds are at least one and all different; got {list(seeds)}")
    if not math.isfinite(resolution) or resolution <= 0:
        wrong.append(f"resolution is a positive number, the relative step of the grid; got {resolution!r}")
    if wrong:
        raise InputError(problems("find_dimension", wrong))


def _score(train_and_score: TrainAndScore, d: int, seed: int) -> float:
    score = train_and_score(d, seed)
    try:
        number = float(score)
    except (TypeError, ValueError) as error:
        raise InputError(f"train_and_score has to return a number; got {score!r} for dimension {d}.") from error
    if number == math.inf:
        raise InputError(f"train_and_score returned +Inf for dimension {d}; a score has to be finite.")
    return -math.inf if math.isnan(number) else number


def _judge(scores: Sequence[float], target: float) -> tuple[bool, bool]:
    """(mean reaches the target, the 95 % interval of the mean lies wholly on that side)."""
    n = len(scores)
    if -math.inf in scores:
        return False, all(score < target for score in scores)
    mean = sum(scores) / n
    reached = mean >= target
    if n == 1:
        return reached, True
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)
    half = float(student.ppf(0.975, n - 1)) * spread
    return reached, (mean - half >= target) if reached else (mean + half < target)


def _report(
    grid: list[int],
    scores: dict[int, list[float]],
    target: float,
    bracket: tuple[int, int],
    sure: tuple[int, int],
    seeds: int,
) -> Finding:
    low, high = bracket
    notes = []
    means = {d: sum(values) / len(values) for d, values in sorted(scores.items())}
    details = {
        "target": target,
        "scores": {str(d): values for d, values in sorted(scores.items())},
        "grid_step": (grid[min(high, len(grid) - 1)] - grid[low]) if low >= 0 else 0,
    }
    if failed := [str(d) for d, mean in means.items() if mean == -math.inf]:
        notes.append(f"training failed (NaN) for some seed at {', '.join(failed)}: counted as not reached")
    if seeds == 1:
        notes.append("one seed: no interval")
    reached = [d for d, mean in means.items() if mean >= target]
    if reached and (fallen := [d for d, mean in means.items() if mean < target and d > reached[0]]):
        notes.append(f"the score does not rise with the dimension: reached at {reached[0]}, not at {fallen[-1]}")
    if high == len(grid):
        notes.append(f"even {grid[-1]} dimensions do not reach the target: raise upper")
        details["interval"] = [grid[-1], math.inf]
        return Finding(
            name="dimension", value=float(grid[-1]), n=seeds, at_least=True, notes=tuple(notes), details=details
        )
    value = grid[high]
    ends_sure = True
    if low < 0:
        notes.append(f"{value} dimensions, the lower bound, reach the target already: it takes at most that many")
    elif _judge(scores[grid[sure[0]]], target) != (False, True):
        notes.append(f"not even {grid[sure[0]]} dimensions fall short for sure: the lower end of the interval is open")
        ends_sure = False
    if _judge(scores[grid[sure[1]]], target) != (True, True):
        notes.append(f"not even {grid[sure[1]]} dimensions reach the target for sure: the upper end is open")
        ends_sure = False
    # The true one is above the last d that is surely too small, and at most the first that is surely enough.
    least = grid[sure[0]] + 1 if low >= 0 else value
    spread = float(max(value - least, grid[sure[1]] - value))
    if seeds > 1:
        details["interval"] = [least, grid[sure[1]]]
    return Finding(
        name="dimension",
        value=float(value),
        uncertainty=spread if seeds > 1 and ends_sure else None,
        n=seeds,
        notes=tuple(notes),
        details=details,
    )


def toy_score(kind: ProjectionKind, dimension: int, seed: int) -> float:
    """Li's toy in closed form: 1000 parameters, each block b of 100 must sum to b; exp(−least squared residual)."""
    matrix = projection(kind, 1000, dimension, seed=seed).dense()
    sums = matrix.view(10, 100, dimension).sum(1)
    wanted = torch.arange(1, 11, dtype=torch.float64)
    # Not the default driver gelsy: it loses the rank of one-hot maps of many columns.
    solution = torch.linalg.lstsq(sums, wanted[:, None], driver="gelsd").solution
    return math.exp(-float((sums @ solution - wanted[:, None]).square().sum()))


CLAIM_KINDS: tuple[ProjectionKind, ...] = ("dense", "fastfood", "one-hot")


CLAIM_RUNS: tuple[tuple[int, ProjectionKind], ...] = (
    (16, "dense"),
    (16, "one-hot"),
    (16, "fastfood"),
    (64, "fastfood"),
)
"""Hidden units and projection."""


def _toy(kind: ProjectionKind) -> Finding:
    return find_dimension(lambda d, seed: toy_score(kind, d, seed), 1, 100, target=1 - 1e-6)


def _d90(width: int, kind: ProjectionKind) -> Finding:
    x, y = byte_kinds(1024, 0)
    unseen = byte_kinds(4096, 1)

    def score(module: nn.Module, seed: int) -> float:
        lr = 1e-1 if isinstance(module, SubspaceModel) else 1e-2
        return accuracy(fit(module, x, y, steps=100, lr=lr), *unseen)

    return intrinsic_dimension(lambda seed: classifier(width, seed), score, 4, 512, kind=kind, resolution=0.3)


def _run_claim() -> Verdict:
    toys = {kind: float(_toy(kind)) for kind in CLAIM_KINDS}
    figures = {f"Li's toy, {kind}": value for kind, value in toys.items()}
    found = [_d90(width, kind) for width, kind in CLAIM_RUNS]
    for (width, kind), d90 in zip(CLAIM_RUNS, found, strict=True):
        name = f"width {width}, {d90.details['parameters']} parameters, {kind}"
        figures[f"{name}: d90"] = float(d90)
        figures |= {f"{name}: {end}": float(d) for end, d in zip(("from", "to"), d90.details["interval"], strict=True)}
    narrow, wide = found[-2:]
    bounded = not any(d90.at_least for d90 in found)
    same = max(float(narrow), float(wide)) < 2 * min(float(narrow), float(wide))
    return Verdict(
        held=set(toys.values()) == {10.0} and bounded and same,
        figures=figures,
        note="kind of the next byte from eight bytes of source text; accuracy on unseen samples, 3 seeds",
    )


METHOD = Diagnostic(
    name="intrinsic-dimension",
    summary="least dimension of a random subspace in which training reaches 90 % of the full performance",
    group="landscape",
    paper=Paper(
        authors="C. Li, H. Farkhoor, R. Liu, J. Yosinski",
        title="Measuring the Intrinsic Dimension of Objective Landscapes",
        year=2018,
        link="https://arxiv.org/abs/1804.08838",
    ),
    entry=intrinsic_dimension,
    claim=Claim(
        statement="The toy of 1000 parameters and ten constraints has intrinsic dimension 10 under every projection, "
        "and d90 of a classifier changes by less than a factor 2 when it has four times the parameters.",
        source="Li et al. 2018: the toy example; abstract: it varies little across models of vastly different sizes",
        run=_run_claim,
    ),
)
