"""The polar factor by products, and the decomposition of a product of thin matrices."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import InputError
from eckart.linalg import polar_factor, product_svd


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (3, 20, 14)])
def test_polar_factor_is_that_of_the_decomposition(shape: tuple[int, ...]) -> None:
    X = random(*shape)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    assert float((S[..., -1] / S.square().sum(-1).sqrt()).min()) > 1e-3
    assert float((polar_factor(X) - U @ Vh).abs().max()) < 2e-3
    assert polar_factor(X.float()).dtype == torch.float32


def test_singular_values_end_near_one_and_zeros_stay() -> None:
    values = torch.cat([torch.logspace(-3, 0, 31, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    values[:31] *= (1 - 1e-9) / values.norm()
    values = torch.where(values >= 1e-3, values, 0.0)
    found = polar_factor(torch.diag(values)).diagonal()
    assert float((found[values > 0] - 1).abs().max()) < 2e-3
    assert bool((found[values == 0] == 0).all())
    assert not polar_factor(torch.zeros(4, 5)).any()


def test_polar_factor_wants_matrices_of_floats() -> None:
    with pytest.raises(InputError, match="matrices"):
        polar_factor(torch.ones(3))
    with pytest.raises(InputError, match="int64"):
        polar_factor(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.parametrize(("m", "k", "n"), [(30, 4, 20), (5, 8, 20), (30, 20, 6), (7, 1, 1)])
def test_product_is_decomposed_without_being_formed(m: int, k: int, n: int) -> None:
    B, A = random(m, k), random(k, n, seed=1)
    found = product_svd(B, A)
    full = torch.linalg.svdvals(B @ A)[: min(m, k, n)]
    torch.testing.assert_close(found.S, full)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, B @ A)
    eye = torch.eye(found.S.numel(), dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye, atol=1e-12, rtol=0)
    one = product_svd(B, A, 1)
    torch.testing.assert_close(one.S, full[:1])


def test_product_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"\(m, k\) and A \(k, n\)"):
        product_svd(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(InputError, match="rank is from 1 to 2"):
        product_svd(torch.ones(3, 2), torch.ones(2, 4), 3)
