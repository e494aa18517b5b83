"""Estimators of dimension: closed forms, naive twins, known manifolds, and what they say of bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import dimension_curve, local_pca, mle_dimension, pca_dimension, two_nn
from eckart.geometry.dimension_curve import ESTIMATORS
from eckart.geometry.manifolds import cube, gaussian, noisy, sphere, swiss_roll

single = {
    "two_nn": two_nn,
    "mle": mle_dimension,
    "local_pca": local_pca,
    "participation": lambda X: pca_dimension(X)[0],
    "energy": lambda X: pca_dimension(X)[1],
}
every_estimator = pytest.mark.parametrize("measure", single.values(), ids=list(single))


def wound_curve(n: int) -> Tensor:
    """A line that passes itself often: strands are further apart than points of it, if there are many."""
    angle = 2 * math.pi * torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (angle * torch.tensor([13, 17, 19]) + torch.arange(3)).sin()


def naive_mle(X: Tensor, k: int) -> float:
    """Levina and Bickel's sums as printed, one point at a time, pooled."""
    total = 0.0
    for i in range(X.shape[0]):
        T = sorted(math.dist(X[i].tolist(), X[j].tolist()) for j in range(X.shape[0]) if j != i)[:k]
        total += sum(math.log(T[-1] / T[j]) for j in range(k - 1))
    return (X.shape[0] * (k - 1) - 1) / total


@pytest.mark.parametrize("k", [2, 3, 10])
def test_mle_is_its_formula(k: int) -> None:
    X = gaussian(40, 3, 5, seed=0)
    assert mle_dimension(X, k=k).value == pytest.approx(naive_mle(X, k), rel=1e-12)


def test_two_nn_is_mle_of_two_neighbours() -> None:
    X = gaussian(100, 3, 5, seed=0)
    assert two_nn(X).value == pytest.approx(mle_dimension(X, k=2).value, rel=1e-12)


def test_slope_is_the_line_through_the_origin() -> None:
    X = gaussian(50, 3, 3, seed=1)
    gaps = torch.cdist(X, X).fill_diagonal_(torch.inf).sort(dim=1).values
    x = (gaps[:, 1] / gaps[:, 0]).log().sort().values
    y = torch.tensor([-math.log(1 - i / 50) for i in range(1, 50)], dtype=torch.float64)
    fitted = torch.linalg.lstsq(x[:45, None], y[:45, None]).solution
    assert two_nn(X, fit="slope").value == pytest.approx(float(fitted), rel=1e-9)
    assert two_nn(X, fit="slope", discard=0.0).value is not None


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_reads_the_same_but_for_rounding(measure, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """bfloat16 keeps 3 digits: neighbours of 300 points in three dimensions lie further apart than that."""
    X = gaussian(300, 3, 3, seed=0)
    assert float(measure(X.to(dtype))) == pytest.approx(float(measure(X)), rel=0.1 if dtype is torch.bfloat16 else 1e-3)


@every_estimator
def test_moving_turning_and_scaling_change_nothing(measure) -> None:  # type: ignore[no-untyped-def]
    X = gaussian(300, 3, 6, seed=0)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    assert float(measure(1e-3 * X @ Q + 5)) == pytest.approx(float(measure(X)), rel=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_low_dimensions_are_read_within_three_standard_errors_and_three_percent(d: int) -> None:
    for measure in (two_nn, mle_dimension):
        finding = measure(sphere(1500, d, 8, seed=d))
        assert abs(float(finding) - d) < 1.5 * float(finding.uncertainty or 0.0) + 0.03 * d
        assert not finding.at_least
    assert float(local_pca(sphere(1500, d, 8, seed=d))) == pytest.approx(d, abs=0.1)


def test_curved_data_are_flat_in_the_small_only() -> None:
    roll = swiss_roll(2000, 5, seed=0)
    assert float(mle_dimension(roll)) == pytest.approx(2, abs=0.15)
    assert float(local_pca(roll)) == pytest.approx(2, abs=0.1)
    assert float(pca_dimension(roll)[1]) == 3


def test_high_dimensions_are_at_least() -> None:
    X = cube(500, 20, 40, seed=0)
    for finding in (two_nn(X), mle_dimension(X), local_pca(cube(500, 40, 60, seed=0))):
        assert finding.at_least
        assert str(finding).split(": ")[1].startswith("≥")
    assert not mle_dimension(torch.randn(500, 8)).at_least
    assert not mle_dimension(cube(2000, 5, 20, seed=0)).at_least


def test_participation_ratio_of_a_known_covariance() -> None:
    scales = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    true = float(scales.square().sum() ** 2 / scales.pow(4).sum())
    finding = pca_dimension(gaussian(20_000, 3, 3, seed=0) @ torch.linalg.qr(torch.eye(3).double()).Q * scales)[0]
    assert abs(float(finding) - true) < 3 * float(finding.uncertainty or 0.0)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_both_sides_of_the_gram_matrix_give_the_same(shape: tuple[int, int]) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Z = X - X.mean(0)
    lambdas = torch.linalg.svdvals(Z).square()
    participation, energy = pca_dimension(X, energy=0.8)
    assert participation.details["plain"] == pytest.approx(
        float(lambdas.sum() ** 2 / lambdas.square().sum()), rel=1e-10
    )
    assert float(energy) == int(((lambdas.cumsum(0) / lambdas.sum()) < 0.8).sum()) + 1
    wide = torch.cat([X, torch.zeros(shape[0], 40)], 1)  # the other branch
    assert float(pca_dimension(wide, energy=0.8)[1]) == float(energy)
    assert pca_dimension(wide)[0].value == pytest.approx(participation.value, rel=1e-9)


@every_estimator
@pytest.mark.parametrize(
    "X",
    [torch.ones(1, 3), torch.ones(60, 3), torch.full((60, 3), 0.1, dtype=torch.float64), torch.randn(2, 3)],
    ids=["one", "constant", "duplicates", "two"],
)
def test_too_little_gives_no_value_and_the_reason(measure, X: Tensor) -> None:  # type: ignore[no-untyped-def]
    finding = measure(X)
    assert finding.value is None
    assert finding.notes
    json.dumps(finding.to_json(), allow_nan=False)


@every_estimator
def test_nan_and_wrong_shapes_raise(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotFiniteError, match="row 0"):
        measure(torch.full((5, 2), torch.nan))
    with pytest.raises(InputError, match="got shape"):
        measure(torch.zeros(5))
    with pytest.raises(InputError, match="at least one"):
        measure(torch.zeros(5, 0))


def test_options_out_of_range_raise() -> None:
    X = torch.randn(30, 2)
    for call in (
        lambda: two_nn(X, fit="best"),  # type: ignore[arg-type]
        lambda: two_nn(X, discard=1.0),
        lambda: mle_dimension(X, k=1),
        lambda: local_pca(X, k=1),
        lambda: local_pca(X, threshold=0.0),
        lambda: local_pca(X, centres=1),
        lambda: pca_dimension(X, energy=0.0),
        lambda: dimension_curve(X, at_most=1),
    ):
        with pytest.raises(InputError, match="got"):
            call()
    with pytest.raises(InputError, match="2 problems"):
        dimension_curve(X, k=1, local_k=0)


def test_duplicates_do_not_change_the_reading() -> None:
    X = gaussian(200, 3, 3, seed=0)
    doubled = two_nn(torch.cat([X, X]))
    assert doubled.value == two_nn(X).value
    assert doubled.notes == ("200 repeated rows dropped",)


def test_a_grid_is_named() -> None:
    X = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    assert two_nn(X).value is None
    assert "grid" in two_nn(X).notes[0]
    verdict = dimension_curve(torch.randint(0, 5, (500, 4), generator=torch.Generator().manual_seed(0))).verdict
    assert "grid" in verdict
    assert verdict.startswith("Dimension about")


def test_the_curve_holds_every_estimator_at_every_size() -> None:
    curve = dimension_curve(gaussian(850, 3, 6, seed=0), seed=3)
    assert list(curve.curves) == list(ESTIMATORS)
    for steps in curve.curves.values():
        assert [step.details["points"] for step in steps] == [850, 425, 212, 106]
        assert [step.details["subsamples"] for step in steps] == [1, 2, 4, 8]
    scales = [step.details["scale"] for step in curve.curves["mle"]]
    assert scales == sorted(scales)
    assert curve.curves["two_nn"][0].value == pytest.approx(two_nn(gaussian(850, 3, 6, seed=0)).value, rel=1e-12)
    assert json.loads(json.dumps(curve.to_json(), allow_nan=False))["verdict"] == curve.verdict
    assert dimension_curve(gaussian(850, 3, 6, seed=0), seed=3) == curve


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (gaussian(1000, 3, 6, seed=0), "Dimension about 3"),
        (cube(500, 30, 40, seed=0), "Dimension at least"),
        (noisy(cube(1500, 2, 40, seed=0), 0.01, seed=1), "TwoNN rises from"),
        (wound_curve(2000), "TwoNN falls from"),
        (torch.ones(5, 2), "Dimension not measured: 1 different row"),
        (torch.randn(1, 2), "Dimension not measured"),
        (gaussian(12, 2, 3, seed=0), "one scale only"),
    ],
    ids=["plain", "high", "noise", "wound", "constant", "one", "few"],
)
def test_the_verdict_says_what_the_curve_shows(X: Tensor, words: str) -> None:
    assert words in dimension_curve(X).verdict


def test_what_was_left_out_is_said() -> None:
    X = gaussian(300, 2, 4, seed=0)
    curve = dimension_curve(torch.cat([X, X[:10]]), at_most=200)
    assert (curve.n, curve.features, curve.duplicates) == (310, 4, 10)
    assert curve.notes == ("10 of 310 rows repeat another and were dropped", "200 of 300 different rows were drawn")
    assert curve.curves["mle"][0].n == 200
