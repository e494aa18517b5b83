"""The Walsh-Hadamard transform against its matrix."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import InputError
from eckart.linalg import walsh_hadamard


def matrix(n: int) -> torch.Tensor:
    """Sylvester's matrix by its recursion."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)], 0)
    return H


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 512, 8192])
def test_equals_the_matrix_and_is_its_own_inverse(n: int) -> None:
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = walsh_hadamard(x)
    assert y.shape == x.shape
    if n <= 512:
        torch.testing.assert_close(y, x @ matrix(n))
    torch.testing.assert_close(walsh_hadamard(y), n * x)


def test_gradient_and_dtypes() -> None:
    x = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(walsh_hadamard, (x,))
    small = x.detach().float()
    assert walsh_hadamard(small).dtype == torch.float32
    torch.testing.assert_close(walsh_hadamard(small), walsh_hadamard(x.detach()).float(), rtol=1e-4, atol=1e-4)
    # bfloat16 keeps 8 bits: sums of 128 terms to about a percent of their size √128.
    coarse = walsh_hadamard(small.bfloat16()).double()
    assert float((coarse - walsh_hadamard(x.detach())).abs().max()) < 0.5


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(0), torch.tensor(1.0), torch.ones(4, dtype=torch.int64)])
def test_refuses(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="walsh_hadamard"):
        walsh_hadamard(x)


def test_inference_before_leaves_nothing_behind() -> None:
    x = torch.ones(4, dtype=torch.float16)  # of no other test, which could have left a good factor
    with torch.inference_mode():
        walsh_hadamard(x)
    x.requires_grad_()
    walsh_hadamard(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8.0] * 4
