"""Projections from few numbers to many: columns, scale, seeds, memory."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError
from eckart.landscape import DenseProjection, FastfoodProjection, OneHotProjection, projection
from eckart.landscape.projections import PROJECTIONS

KINDS = list(PROJECTIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parameters", "dimension"), [(1, 1), (64, 64), (100, 7), (1000, 40), (1025, 3)])
def test_is_linear_of_full_rank_with_columns_near_one(kind, parameters: int, dimension: int) -> None:
    P = projection(kind, parameters, dimension, seed=3)
    matrix = P.dense()
    assert matrix.shape == (parameters, dimension)
    theta = torch.randn(dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(P(theta), matrix @ theta)
    assert int(torch.linalg.matrix_rank(matrix)) == dimension
    # Fastfood is cut from L to D rows: exact where D = L, else to the scatter of a sum of D random terms.
    loose = kind == "fastfood" and parameters & (parameters - 1) > 0
    assert (matrix.norm(dim=0) - 1).abs().max() < (5 / math.sqrt(parameters) if loose else 1e-12)


def test_one_hot_is_an_isometry_and_leaves_no_coordinate_empty() -> None:
    for parameters, dimension in ((10, 10), (10, 9), (103, 20)):
        matrix = OneHotProjection(parameters, dimension, seed=1).dense()
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(dimension, dtype=torch.float64))
        assert ((matrix != 0).sum(1) == 1).all()
        loads = (matrix != 0).sum(0)
        assert int(loads.max()) - int(loads.min()) <= 1


def test_fastfood_equals_its_formula() -> None:
    """H G Π H B from the buffers, written as matrices, and the normalisation √(D Σ g²) of Gaussians."""
    P = FastfoodProjection(50, 20, seed=5)
    eye = torch.eye(64, dtype=torch.float64)
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < 64:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    full = H @ torch.diag(P.normals) @ eye[P.order] @ H
    torch.testing.assert_close(P.dense(), full[:50, :20] * P.signs)
    assert float(P.normals.square().sum()) * 50 == pytest.approx(1)
    assert set(P.signs.tolist()) == {1.0, -1.0}


def test_fastfood_columns_are_unit_on_average_over_draws() -> None:
    norms = torch.cat([FastfoodProjection(70, 8, seed=seed).dense().square().sum(0) for seed in range(200)])
    assert float(norms.mean()) == pytest.approx(1, abs=4 * float(norms.std()) / math.sqrt(200))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_fixes_it_and_nothing_is_saved(kind) -> None:
    one, same, other = (projection(kind, 200, 9, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one.dense(), same.dense())
    assert not torch.allclose(one.dense(), other.dense())
    assert one.state_dict() == {}
    assert list(one.parameters()) == []


@pytest.mark.parametrize("kind", ["fastfood", "one-hot"])
def test_memory_does_not_grow_with_the_dimension(kind) -> None:
    P = projection(kind, 100_000, 5_000)
    assert sum(buffer.numel() for buffer in P.buffers()) < 4 * 100_000


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_transpose_and_dtypes_follow(kind) -> None:
    P = projection(kind, 90, 6)
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(90, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(P(theta), theta, g)
    torch.testing.assert_close(found, P.dense().T @ g)
    small = P.to(torch.float32)(torch.ones(6))
    assert small.dtype == torch.float32
    torch.testing.assert_close(small.double(), projection(kind, 90, 6)(torch.ones(6).double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "dimension", "seed"), [(5, 6, 0), (5, 0, 0), (0, 1, 0), (5, 1.5, 0), (5, True, 0), (5, 2, -1)]
)
def test_refuses_sizes_and_seeds(parameters, dimension, seed) -> None:
    for kind in PROJECTIONS.values():
        with pytest.raises(InputError, match=kind.__name__):
            kind(parameters, dimension, seed=seed)


def test_refuses_unknown_names() -> None:
    with pytest.raises(InputError, match="fastfood"):
        projection("fastfod", 5, 2)  # type: ignore[arg-type]


def test_dense_columns_are_nearly_orthogonal() -> None:
    matrix = DenseProjection(4000, 10).dense()
    gram = matrix.T @ matrix - torch.eye(10, dtype=torch.float64)
    assert float(gram.abs().max()) < 5 / math.sqrt(4000)
