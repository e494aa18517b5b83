r"""Label sharpness: how quickly labels change with the data, and how the loss falls with more of them.

*What it does.* Measures the steepest change of label over distance among pairs of points. Together with the dimension
it says what data cost: sharp labels on many dimensions need many points.

*Formula.* K_F = max |y_i − y_j| / ‖x_i − x_j‖ over pairs; for classes the numerator is 1[y_i ≠ y_j], so that K_F is one
over the least distance between points of different classes. Then the test loss of a net that fits N points is of
the order K_F N^(−1/d), so that it falls by (N'/N)^(−1/d) from N to N' points.

*Cost.* D multiply-adds per pair.

*When it does not help.* As an absolute number: it has units of 1/distance, and being a maximum it grows with the number
of pairs and hangs on one of them. So the 99.9 % quantile, with its interval, stands beside it, and both also times the
root mean square distance of pairs, without units. Compare data sets at equal n and equal pairs. The scaling law is an
upper bound for Lipschitz losses and nets that interpolate; it gives no constant. The loss follows the mean slope and
K_F the steepest one: in the claim below three times the K_F costs 3.6 to 4.3 times the loss.

*Departs from the paper in.* The published code tests whole (x, y) items for equality in its multi-class branch, and so
scores pairs of the same label; here it is 1[y ≠ y']. Pairs are all pairs where there are at most ``pairs`` of them,
else drawn with replacement; points of different labels at distance 0 have no finite sharpness and are counted apart.

*Reference.* N. Konz, M. A. Mazurowski, “The Effect of Intrinsic Dataset Properties on Generalization: Unraveling
Learning Differences Between Natural and Medical Images”, 2024, https://arxiv.org/abs/2401.08865.

*Example.*

>>> import torch
>>> x = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
>>> sharpness = label_sharpness(x, 3 * x[:, 0])
>>> round(sharpness.value, 6), sharpness.n
(3.0, 5050)
>>> print(loss_scaling(1000, 8000, dimension=3.0))
loss_factor: 0.5 (n = 8000)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.geometry.points import NORMAL_95, as_points
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

BATCH_NUMBERS = 2**22
QUANTILE = 0.999


def label_sharpness(
    X: Tensor, y: Tensor, *, classes: bool | None = None, pairs: int = 200_000, seed: int = 0
) -> Finding:
    """K_F of the points X (n, D) with labels y (n,), numbers or class indices, over at most ``pairs`` pairs.

    ``classes`` says what y is; None takes integers and booleans for classes. The value is “at least” where pairs were
    drawn. ``details`` gives ``quantile`` (99.9 %) with its 95 % interval, ``width``, the root mean square distance of
    pairs, and ``contradictions``, the pairs at distance 0 with different labels. Value None for fewer than two rows
    and where all pairs lie at distance 0. Raises InputError for shapes that do not fit, NotFiniteError for NaN
    and Inf.
    """
    points = as_points(X, "label_sharpness")
    labels = as_points(y[:, None] if isinstance(y, Tensor) and y.ndim == 1 else y, "label_sharpness, y").flatten(1)
    found = []
    if labels.shape != (points.shape[0], 1):
        found.append(f"y has one label a row of X, shape ({points.shape[0]},); got {tuple(y.shape)}")
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
        found.append(f"pairs is an int of at least 1; got {pairs!r}")
    if found:
        raise InputError(problems("label_sharpness", found))
    n = points.shape[0]
    if n < 2:
        return Finding(name="label_sharpness", value=None, n=0, notes=("1 row makes no pair",))
    by_class = not y.is_floating_point() if classes is None else classes
    left, right = _pairs(n, pairs, seed)
    apart, change = _differences(points, labels.flatten(), left, right, by_class)
    together = apart == 0
    contradictions = int((together & (change > 0)).sum())
    notes: tuple[str, ...] = (
        (f"{contradictions} pairs of equal points have different labels",) if contradictions else ()
    )
    if bool(together.all()):
        notes += ("all pairs lie at distance 0",)
        return Finding(name="label_sharpness", value=None, n=left.numel(), notes=notes)
    ratios = change[~together] / apart[~together]
    quantile, low, high = _quantile(ratios)
    complete = left.numel() == n * (n - 1) // 2
    return Finding(
        name="label_sharpness",
        value=float(ratios.max()),
        uncertainty=0.0 if complete else None,
        n=left.numel(),
        unit="classes / distance" if by_class else "label / distance",
        at_least=not complete,
        notes=notes,
        details={
            "quantile": quantile,
            "quantile_interval": [low, high],
            "width": float(apart.square().mean().sqrt()),
            "contradictions": contradictions,
        },
    )


def loss_scaling(n: int, more: int, *, dimension: float | Finding) -> Finding:
    """By which factor K_F n^(−1/d) changes from n to ``more`` points, with the interval that d's gives.

    ``dimension`` is d > 0, or the Finding of an estimator; where that is “at least”, so is the factor, which rises
    with d for more points. Raises InputError for counts below 1 and a dimension that is missing or not positive.
    """
    d = float(dimension)
    found = [
        f"{name} counts points, an int of at least 1; got {value!r}"
        for name, value in (("n", n), ("more", more))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if not (math.isfinite(d) and d > 0):
        found.append(f"dimension is a positive number or a Finding with a value; got {dimension}")
    if found:
        raise InputError(problems("loss_scaling", found))
    factor = (more / n) ** (-1 / d)
    of_d = dimension.uncertainty if isinstance(dimension, Finding) else 0.0
    return Finding(
        name="loss_factor",
        value=factor,
        uncertainty=None if of_d is None else factor * abs(math.log(more / n)) / d**2 * of_d,
        n=more,
        at_least=isinstance(dimension, Finding) and dimension.at_least and more > n,
        details={"from": n, "dimension": d},
    )


def _pairs(n: int, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    if n * (n - 1) // 2 <= pairs:
        left, right = torch.triu_indices(n, n, offset=1)
        return left, right
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, n, (pairs,), generator=generator)
    return left, (left + torch.randint(1, n, (pairs,), generator=generator)) % n


def _differences(points: Tensor, labels: Tensor, left: Tensor, right: Tensor, by_class: bool) -> tuple[Tensor, Tensor]:
    size = max(1, BATCH_NUMBERS // points.shape[1])
    parts = zip(torch.split(left, size), torch.split(right, size), strict=True)
    apart = torch.cat([(points[i] - points[j]).norm(dim=1) for i, j in parts])
    change = labels[left] - labels[right]
    return apart, (change != 0).double() if by_class else change.abs()


def _quantile(ratios: Tensor) -> tuple[float, float, float]:
    """The 99.9 % quantile and the order statistics that bracket it with 95 %."""
    ascending = ratios.sort().values
    m = ascending.numel()
    middle, spread = QUANTILE * (m - 1), NORMAL_95 * math.sqrt(m * QUANTILE * (1 - QUANTILE))

    def at(place: float) -> float:
        return float(ascending[min(m - 1, max(0, round(place)))])

    return at(middle), at(middle - spread), at(middle + spread)


def _nearest_label(d: int, frequency: float, n: int) -> tuple[float, float]:
    """Mean error of the nearest neighbour's label on 1000 held-out points of a d-cube, and K_F, for sin(frequency ·
    u)."""
    X = torch.rand(n + 1000, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    labels = (frequency * X.sum(1) / math.sqrt(d)).sin()
    nearest = torch.cdist(X[n:], X[:n]).argmin(1)
    return float((labels[n:] - labels[nearest]).abs().mean()), float(label_sharpness(X[:n], labels[:n]))


def _run_claim() -> Verdict:
    """The simplest net that interpolates, one nearest neighbour: its loss from 250 to 4000 points, and by K_F."""
    figures: dict[str, float] = {}
    held = True
    for d in (1, 2, 4):
        (few, _), (many, gentle) = _nearest_label(d, 2.0, 250), _nearest_label(d, 2.0, 4000)
        steep, sharp = _nearest_label(d, 6.0, 4000)
        exponent = -d * math.log(many / few) / math.log(16)
        figures |= {f"d = {d}: exponent times d": exponent, f"d = {d}: loss ratio": steep / many}
        figures[f"d = {d}: ratio of K_F"] = sharp / gentle
        held = held and abs(exponent - 1) < 0.15 and sharp > gentle and steep > many
    return Verdict(held=held, figures=figures, note="labels sin(2 u) and sin(6 u), u the diagonal coordinate of a cube")


METHOD = Diagnostic(
    name="label-sharpness",
    summary="steepest change of label over distance, and the loss that more data would give",
    group="data",
    paper=Paper(
        authors="N. Konz, M. A. Mazurowski",
        title="The Effect of Intrinsic Dataset Properties on Generalization: Unraveling Learning Differences Between "
        "Natural and Medical Images",
        year=2024,
        link="https://arxiv.org/abs/2401.08865",
    ),
    entry=label_sharpness,
    claim=Claim(
        statement="The loss of an interpolating predictor on cubes of dimension 1, 2 and 4 falls as N^(−1/d), the "
        "exponent within 15 %, and of two labellings the one with the larger K_F loses more.",
        source="Konz and Mazurowski 2024: loss of the order K_F N^(−1/d)",
        run=_run_claim,
    ),
)
