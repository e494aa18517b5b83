"""Roots, pivoted rows, shrinkage, and weights as matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import unfold

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import fold, matricize, pivot_rows, shrink_to_diagonal, symmetric_root


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_root_of_a_definite_matrix() -> None:
    X = normal(30, 8)
    S = X.T @ X
    root, inverse = symmetric_root(S)
    torch.testing.assert_close(root @ root, S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root @ inverse, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)


def test_root_of_a_singular_matrix_is_a_pseudo_inverse() -> None:
    X = normal(30, 8)
    X = X - X.mean(dim=1, keepdim=True)
    S = X.T @ X
    root, inverse = symmetric_root(S)
    projection = torch.eye(8, dtype=torch.float64) - 1 / 8
    torch.testing.assert_close(root @ inverse, projection, rtol=0, atol=1e-9)
    assert inverse.abs().max() < 10


def test_root_of_a_diagonal_clips_what_is_negative() -> None:
    root, inverse = symmetric_root(torch.tensor([4.0, 0.0, -1e-3, 1e-30, 9.0]))
    assert root.tolist() == [2, 0, 0, 0, 3]
    assert inverse.tolist() == pytest.approx([0.5, 0, 0, 0, 1 / 3])
    root, inverse = symmetric_root(torch.tensor([4.0, 1.0]), rtol=0.5)
    assert root.tolist() == [2, 0]
    assert symmetric_root(torch.zeros(3, 3))[1].tolist() == torch.zeros(3, 3).tolist()


def test_root_refuses_what_is_no_metric() -> None:
    with pytest.raises(InputError, match="square"):
        symmetric_root(torch.ones(2, 3))
    with pytest.raises(NotFiniteError, match="NaN"):
        symmetric_root(torch.tensor([1.0, float("nan")]))


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_pivot_rows_write_the_others(k: int, more: int, seed: int) -> None:
    left = normal(k + more, k, seed=seed)
    kept, rest, T = pivot_rows(left)
    assert sorted([*kept.tolist(), *rest.tolist()]) == list(range(k + more))
    assert kept.tolist() == sorted(kept.tolist())
    assert rest.tolist() == sorted(rest.tolist())
    assert T.shape == (more, k)
    torch.testing.assert_close(T @ left[kept], left[rest], rtol=1e-8, atol=1e-8)
    assert more == 0 or T.abs().max() < 10


def test_pivot_rows_do_not_depend_on_the_scale_of_columns() -> None:
    left = normal(40, 10)
    scaled = left * torch.logspace(0, -9, 10, dtype=torch.float64)
    kept, rest, T = pivot_rows(scaled)
    assert kept.tolist() == pivot_rows(left)[0].tolist()
    torch.testing.assert_close(T @ left[kept], left[rest], rtol=1e-6, atol=1e-6)


def test_pivot_rows_of_less_than_full_rank() -> None:
    left = normal(20, 3) @ normal(3, 6, seed=1)
    kept, rest, T = pivot_rows(left)
    torch.testing.assert_close(T @ left[kept], left[rest], rtol=1e-9, atol=1e-9)
    assert T.abs().max() < 10
    kept, rest, T = pivot_rows(torch.zeros(5, 2))
    assert (T == 0).all()
    assert len(kept) == 2


def test_pivot_rows_refuses_wide_and_not_finite() -> None:
    with pytest.raises(InputError, match="1 ≤ k ≤ m"):
        pivot_rows(torch.ones(2, 3))
    with pytest.raises(NotFiniteError):
        pivot_rows(torch.full((3, 2), float("inf")))


def test_shrink_keeps_the_diagonal() -> None:
    S = normal(4, 4)
    for rho in (0.0, 0.3, 1.0):
        shrunk = shrink_to_diagonal(S, rho)
        assert torch.equal(shrunk.diagonal(), S.diagonal())
        assert float(shrunk[0, 1]) == pytest.approx((1 - rho) * float(S[0, 1]))
    diagonal = torch.ones(3)
    assert shrink_to_diagonal(diagonal, 0.5) is diagonal
    with pytest.raises(InputError, match="share"):
        shrink_to_diagonal(S, 1.5)
    with pytest.raises(InputError, match="square"):
        shrink_to_diagonal(torch.ones(2, 3), 0.5)


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "expected"),
    [
        ("linear", (5, 3), 1, (1, 5, 3)),
        ("conv1d", (3, 5), 1, (1, 5, 3)),
        ("conv", (6, 2, 3), 2, (2, 3, 6)),
        ("conv", (6, 4, 3, 3), 1, (1, 6, 36)),
        ("embedding", (50, 8), 1, (1, 8, 50)),
        ("experts", (4, 5, 3), 1, (4, 5, 3)),
    ],
)
def test_fold_undoes_matricize(kind: str, shape: tuple[int, ...], groups: int, expected: tuple[int, ...]) -> None:
    weight = normal(*shape)
    matrices = matricize(weight, kind, groups)
    assert matrices.shape == expected
    assert torch.equal(fold(matrices, kind, shape), weight)
    assert matrices.data_ptr() == weight.data_ptr()


def test_columns_of_a_convolution_are_those_of_unfold() -> None:
    weight, x = normal(6, 2, 3, 3), normal(1, 4, 7, 7)
    y = torch.nn.functional.conv2d(x, weight, groups=2)
    slices = matricize(weight, "conv", 2)
    parts = [slices[g] @ unfold(x[:, 2 * g : 2 * g + 2], 3) for g in range(2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), y.flatten(2), rtol=1e-12, atol=1e-12)


def test_shapes_that_do_not_fit_the_kind_are_refused() -> None:
    with pytest.raises(InputError, match=r"a linear weight has shape \(out, in\)"):
        matricize(torch.ones(2, 3, 4), "linear")
    with pytest.raises(InputError, match="only convolutions have groups"):
        matricize(torch.ones(2, 3), "linear", 2)
    with pytest.raises(InputError, match="groups divides"):
        matricize(torch.ones(5, 3, 3), "conv", 2)
    with pytest.raises(InputError, match="fold"):
        fold(torch.ones(1, 2, 3), "linear", (3, 2))
