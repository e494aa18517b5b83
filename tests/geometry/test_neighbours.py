"""Exact neighbours against a naive twin, the awkward cases of float arithmetic, and standard errors against reality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import neighbours as neighbours_module
from eckart.geometry import two_nn
from eckart.geometry.manifolds import gaussian
from eckart.geometry.mle import mle_of
from eckart.geometry.neighbours import Neighbours, neighbours
from eckart.geometry.points import as_points, distinct, second_order


def found(X: Tensor, k: int) -> Neighbours:
    result = neighbours(X, k)
    assert isinstance(result, Neighbours), result
    return result


def naive(X: Tensor, k: int) -> Tensor:
    """All distances by differences, one pair of rows at a time in effect."""
    gaps = (X[:, None] - X[None]).square().sum(2).sqrt()
    gaps.fill_diagonal_(torch.inf)
    return gaps.sort(dim=1).values[:, :k]


@pytest.mark.parametrize("shape", [(40, 1), (40, 7), (12, 30), (3, 2)])
def test_distances_are_those_of_the_naive_twin(shape: tuple[int, int]) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = min(5, shape[0] - 1)
    result = found(X, k)
    assert torch.allclose(result.distances, naive(X, k), rtol=1e-13, atol=0)
    reached = (X[:, None] - X[result.indices]).norm(dim=2)
    assert torch.allclose(reached, result.distances, rtol=1e-13, atol=0)
    assert not bool((result.indices == torch.arange(shape[0])[:, None]).any())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    X = gaussian(60, 4, 6, seed=0)
    whole = found(X, 5)
    monkeypatch.setattr(neighbours_module, "BLOCK_NUMBERS", 200)
    assert torch.equal(found(X, 5).distances, whole.distances)


def test_a_tight_cluster_beside_a_far_point_is_exact() -> None:
    """‖x‖² + ‖y‖² − 2⟨x, y⟩ alone would lose every digit of these distances."""
    cluster = 1e-9 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.cat([cluster, torch.full((1, 3), 1e3, dtype=torch.float64)])
    result = found(X, 4)
    gaps = naive(X - X.mean(0), 4)
    assert torch.allclose(result.distances, gaps, rtol=1e-12, atol=0)


def test_ties_on_a_grid_are_exact() -> None:
    X = torch.cartesian_prod(torch.arange(6), torch.arange(6), torch.arange(6))
    assert torch.equal(found(X, 3).distances, naive(X.double(), 3))


def test_repeated_rows_are_dropped_and_counted() -> None:
    X = gaussian(30, 3, 3, seed=0)
    doubled = torch.cat([X, X[:7], X[:2], -0.0 * X[:1]])
    result = found(torch.cat([doubled, 0.0 * X[:1]]), 2)
    assert result.duplicates == 10
    assert result.n == 31
    assert torch.equal(distinct(torch.cat([X, X[:7]])), X)
    assert bool((result.distances > 0).all())


def test_too_few_rows_give_the_reason() -> None:
    assert neighbours(torch.ones(4, 2), 2) == "1 distinct rows of 4: 2 neighbours need at least 3"
    assert "rescale" in str(neighbours(torch.tensor([[0.0], [1e200], [3e200]], dtype=torch.float64), 1))


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_is_checked(k: object) -> None:
    with pytest.raises(InputError, match="k counts neighbours"):
        neighbours(torch.randn(5, 2), k)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        ([[1.0]], InputError, "expected a torch.Tensor"),
        (torch.tensor(1.0), InputError, "got shape"),
        (torch.zeros(3), InputError, "n points on a line"),
        (torch.zeros(3, 2, 2), InputError, "flatten"),
        (torch.zeros(0, 2), InputError, "at least one row"),
        (torch.zeros(2, 0), InputError, "at least one row"),
        (torch.zeros(2, 2, dtype=torch.complex64), InputError, "real numbers"),
        (torch.eye(2).to_sparse(), InputError, "to_dense"),
        (torch.tensor([[0.0], [torch.nan], [torch.inf]]), NotFiniteError, "2 of 3 rows, the first is row 1"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(X: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_points(X, "here")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_other_types_are_cast_without_loss(dtype: torch.dtype) -> None:
    X = (4 * torch.randn(9, 2, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert as_points(X, "here").dtype is torch.float64
    assert torch.equal(as_points(X, "here").to(dtype), X)


def test_stated_standard_errors_are_the_spread_of_readings() -> None:
    """200 samples: the sd of the readings is known to 5 %; neighbours that are shared make it larger than d / √n."""
    readings, stated = [], []
    for seed in range(200):
        finding = two_nn(gaussian(200, 3, 3, seed=1000 + seed))
        readings.append(float(finding))
        stated.append(float(finding.uncertainty or 0.0) / 1.959964)
    ratio = float(torch.tensor(readings).std()) / (sum(stated) / len(stated))
    assert 0.8 < ratio < 1.2
    pooled = [found(gaussian(200, 3, 3, seed=1000 + seed), 10) for seed in range(60)]
    findings = [mle_of(result) for result in pooled]
    spread = float(torch.tensor([float(f) for f in findings]).std())
    mean = sum(float(f.uncertainty or 0.0) for f in findings) / 60 / 1.959964
    assert 0.5 < spread / mean < 1.2  # on the safe side


def test_traces_have_no_bias() -> None:
    """Over 4000 samples of 8 uniform points; skewed in scale, not Gaussian."""
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    squares, traces = [], []
    for _ in range(4000):
        X = (torch.rand(8, 4, generator=generator, dtype=torch.float64) - 0.5) * 12**0.5 * scales
        moments = second_order(X - X.mean(0))
        squares.append(moments.square_trace)
        traces.append(moments.trace_squared)
    for values, true in ((squares, scales.pow(4).sum()), (traces, scales.square().sum() ** 2)):
        drawn = torch.tensor(values, dtype=torch.float64)
        assert abs(float(drawn.mean() - true)) < 4 * float(drawn.std()) / 4000**0.5


def test_traces_are_sums_over_different_points() -> None:
    """The U-statistic that tr Σ² is: mean of ⟨x_i − x_j, x_k − x_l⟩² / 4 over four different points."""
    X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, count = 0.0, 0
    for i in range(6):
        for j in range(6):
            for k in range(6):
                for m in range(6):
                    if len({i, j, k, m}) == 4:
                        total += float((X[i] - X[j]) @ (X[k] - X[m])) ** 2 / 4
                        count += 1
    assert second_order(X - X.mean(0)).square_trace == pytest.approx(total / count, rel=1e-12)
