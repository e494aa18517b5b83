"""The cosine transform against its matrix, on every route."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg import dct, dct_columns, inverse_dct
from eckart.linalg.cosines import _makhoul, _makhoul_inverse


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def basis(n: int) -> Tensor:
    Q = torch.tensor(
        [[math.sqrt(2 / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for k in range(n)] for j in range(n)],
        dtype=torch.float64,
    )
    Q[:, 0] /= math.sqrt(2)
    return Q


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 64])
def test_every_route_is_the_product_with_the_basis(n: int) -> None:
    X, Q = gaussian(2, 3, n), basis(n)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(dct_columns(n, torch.arange(n), torch.float64), Q)
    for forward, backward in ((dct, inverse_dct), (_makhoul, _makhoul_inverse)):
        torch.testing.assert_close(forward(X), X @ Q)
        torch.testing.assert_close(backward(X), X @ Q.T)
    torch.testing.assert_close(dct(X.movedim(-1, 0), dim=0), (X @ Q).movedim(-1, 0))
    torch.testing.assert_close(inverse_dct(dct(X, 1), 1), X)
    torch.testing.assert_close(dct(X.mT, -2), (X @ Q).mT)


@pytest.mark.parametrize("transform", [dct, inverse_dct])
def test_gradients(transform) -> None:  # type: ignore[no-untyped-def]
    x = gaussian(2, 9).requires_grad_()
    torch.testing.assert_close(transform(x), transform(x.detach()))
    assert torch.autograd.gradcheck(transform, (x,))
    y = gaussian(3, 2500)  # beyond the product, by FFT
    torch.testing.assert_close(transform(y.clone().requires_grad_()).detach(), transform(y))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_dtypes(dtype: torch.dtype, bound: float) -> None:
    x = gaussian(4, 100).to(dtype)
    kept = x.clone()
    y = dct(x)
    assert y.dtype == dtype
    assert torch.equal(x, kept)
    # Rounding of the result to ``dtype`` is all that is lost: entries are about 1 in size, the largest about 3.
    torch.testing.assert_close(y.double(), x.double() @ basis(100), atol=bound, rtol=bound)


def test_columns_of_stacks_and_types() -> None:
    index = torch.tensor([[0, 3], [5, 1]])
    found = dct_columns(6, index, torch.float32)
    assert found.shape == (2, 6, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1].double(), basis(6)[:, [5, 1]], atol=1e-7, rtol=1e-6)
    x = gaussian(4, 6)
    torch.testing.assert_close(dct(x)[:, index[0]], x @ dct_columns(6, index[0], torch.float64))


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.int64), torch.tensor(1.0), torch.ones(2, 0)])
def test_refuses(x: Tensor) -> None:
    with pytest.raises(InputError, match="dct"):
        dct(x)
    with pytest.raises(InputError, match="dct_columns"):
        dct_columns(0, torch.arange(1))
    with pytest.raises(InputError, match="dct_columns"):
        dct_columns(4, torch.ones(1))
