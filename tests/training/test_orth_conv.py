"""The penalty of orthogonal convolutions, against the matrix of the layer written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, pad

from eckart.errors import InputError, NotFiniteError
from eckart.training import (
    circular_singular_values,
    orthogonal_convolution_exists,
    orthogonal_convolution_penalty,
    singular_value_bounds,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(K: Tensor, inputs: list[int], steps: list[int]) -> Tensor:
    """The layer with circular padding, by its images of the unit vectors."""
    units = torch.eye(K.shape[1] * math.prod(inputs), dtype=K.dtype).reshape(-1, K.shape[1], *inputs)
    room = [r for k in reversed(K.shape[2:]) for r in (0, k - 1)]
    out = (conv1d if K.ndim == 3 else conv2d)(pad(units, room, mode="circular"), K, stride=steps)
    return out.flatten(1).T


CASES = [
    ((3, 4, 3, 3), [1, 1]),  # rows
    ((5, 2, 3, 3), [1, 1]),  # columns
    ((4, 2, 3, 3), [2, 2]),
    ((9, 2, 3, 3), [2, 2]),
    ((5, 2, 4, 2), [3, 1]),
    ((9, 2, 3, 4), [2, 2]),
    ((3, 2, 5), [1]),
    ((3, 2, 3), [2]),
    ((7, 2, 4), [3]),
]


@pytest.mark.parametrize(("shape", "steps"), CASES, ids=str)
def test_penalty_and_values_are_those_of_the_matrix(shape: tuple[int, ...], steps: list[int]) -> None:
    K = gaussian(*shape) / 3
    N = 5 if len(steps) == 2 else 9  # at least as many as there are shifts
    A = matrix(K, [N * s for s in steps], steps)
    gram = A @ A.T if shape[0] <= shape[1] * math.prod(steps) else A.T @ A
    wanted = (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum() / N ** len(steps)
    torch.testing.assert_close(orthogonal_convolution_penalty(K, steps), wanted)
    values = circular_singular_values(K, N, steps)
    torch.testing.assert_close(values, torch.linalg.svdvals(A))
    low, high = singular_value_bounds(K, steps)
    assert low <= float(values[-1])
    assert float(values[0]) <= high


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_near_orthogonality(seed: int) -> None:
    K = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    K[:, :, 1, 1] = torch.linalg.qr(gaussian(4, 4, seed=seed)).Q
    K = K + 0.003 * gaussian(4, 4, 3, 3, seed=seed + 10)
    low, high = singular_value_bounds(K)
    values = circular_singular_values(K, 9)
    assert 0.5 < low <= float(values[-1]) < 1 < float(values[0]) <= high < 1.5


def test_existence() -> None:
    def exists(M: int, C: int, k: int, S: int, d: int = 2) -> bool:
        return orthogonal_convolution_exists(out_channels=M, in_channels=C, kernel_size=k, stride=S, dimensions=d)

    assert exists(9, 1, 3, 4)  # rows, M = C k²
    assert not exists(10, 1, 3, 4)
    assert exists(5, 1, 3, 2)  # columns, S ≤ k
    assert not exists(12, 1, 2, 3)
    assert exists(3, 1, 3, 4, 1)
    assert not exists(4, 1, 3, 4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_kernels_and_autocast(dtype: torch.dtype) -> None:
    K = (gaussian(3, 4, 3, 3) / 3).to(dtype).requires_grad_()
    exact = orthogonal_convolution_penalty(K.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonal_convolution_penalty(K)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-5)
    found.backward()
    assert K.grad is not None
    assert K.grad.dtype == dtype


def test_gradient() -> None:
    K = (gaussian(3, 2, 3) / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: orthogonal_convolution_penalty(k, 2), (K,))


def test_groups_are_summed_and_modules_know_their_stride() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, groups=2).double()
    parts = [orthogonal_convolution_penalty(K, 2) for K in conv.weight.detach().chunk(2)]
    torch.testing.assert_close(orthogonal_convolution_penalty(conv).detach(), parts[0] + parts[1])
    assert len(circular_singular_values(conv, 4)) == 2 * 3 * 16
    assert singular_value_bounds(conv)[1] == max(singular_value_bounds(K, 2)[1] for K in conv.weight.chunk(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: orthogonal_convolution_penalty(nn.Linear(2, 2)), "nn.Conv1d"),
        (lambda: orthogonal_convolution_penalty(nn.ConvTranspose2d(2, 2, 3)), "ConvTranspose2d"),
        (lambda: orthogonal_convolution_penalty(nn.Conv2d(2, 2, 3, dilation=2)), "dilation"),
        (lambda: orthogonal_convolution_penalty(nn.Conv2d(2, 2, 3), 1), "has its stride"),
        (lambda: orthogonal_convolution_penalty(torch.ones(2, 2)), r"\(M, C, k\)"),
        (lambda: orthogonal_convolution_penalty(torch.ones(2, 2, 3, dtype=torch.int64)), "int64"),
        (lambda: orthogonal_convolution_penalty(torch.ones(2, 2, 3), (1, 1)), "stride"),
        (lambda: orthogonal_convolution_penalty(torch.ones(2, 2, 3), 0), "stride"),
        (lambda: circular_singular_values(torch.ones(2, 2, 3), 2), "does not fit"),
        (
            lambda: orthogonal_convolution_exists(out_channels=0, in_channels=0, kernel_size=3, dimensions=3),
            r"(?s)out_channels.*in_channels.*dimensions",
        ),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]


def test_nan_is_named() -> None:
    K = torch.full((1, 1, 3), torch.nan)
    with pytest.raises(NotFiniteError):
        singular_value_bounds(K)
    with pytest.raises(NotFiniteError):
        circular_singular_values(K, 5)
