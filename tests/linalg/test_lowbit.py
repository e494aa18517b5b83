"""Packed tensors: error bounds, exact zeros, unbiased rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg import pack, round_stochastically, unpack


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("shape", "block"), [((3, 40), 16), ((3, 40), None), ((2, 3, 300), 256), ((600,), 256), ((0, 4), 2)]
)
def test_signed_error_is_half_a_step(shape: tuple[int, ...], block: int | None, bits: int, dtype: torch.dtype) -> None:
    X = gaussian(*shape).to(dtype)
    codes, scales = pack(X, bits=bits, block=block)
    n = shape[-1]
    assert codes.shape == (*shape[:-1], n if bits == 8 else n // 2)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert scales.shape == (*shape[:-1], 1 if block is None else -(-n // block))
    back = unpack(codes, scales, bits=bits, block=block)
    size = n if block is None else block
    for start in range(0, n, size):
        part = X[..., start : start + size].float()
        if part.numel():
            step = part.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)
            assert bool(((back[..., start : start + size] - part).abs() <= 0.5001 * step).all())


def test_unsigned_is_relative_keeps_zero_and_never_makes_one() -> None:
    X = torch.cat([torch.zeros(3), 10.0 ** torch.linspace(-12, 0, 500)])[
        torch.randperm(503, generator=torch.Generator().manual_seed(0))
    ]
    codes, scales = pack(X, signed=False, block=None)
    assert codes.dtype == torch.uint8
    back = unpack(codes, scales, signed=False, block=None)
    assert torch.equal(back == 0, X == 0)
    c = codes.float()
    inside = X > 1e-6
    assert bool(((back - X).abs()[inside] <= (2.5 / c * X)[inside]).all())
    assert float((back / X - 1)[X > 0.1].abs().max()) < 0.015
    assert float(back[(X > 0) & (X < 1e-10)].max()) < 4e-10


def test_zeros_tiny_and_faulty_blocks() -> None:
    X = torch.zeros(5, 4)
    X[1] = 1e-42
    X[2, 1] = float("nan")
    X[3, 1] = float("inf")
    X[4, 1] = 1.0
    for signed in (True, False):
        back = unpack(*pack(X, signed=signed, block=4), signed=signed, block=4)
        assert not bool(back[:2].any())
        assert not bool(back[2:4].isfinite().all(1).any())
        assert torch.equal(back[4], X[4])


@pytest.mark.parametrize("signed", [True, False])
def test_random_codes_have_the_right_mean_and_repeat_by_seed(signed: bool) -> None:
    X = gaussian(1, 64) if signed else gaussian(1, 64).square()
    many = X.expand(4000, 64)

    def drawn() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return unpack(*pack(many, signed=signed, block=64, generator=generator), signed=signed, block=64)

    back = drawn()
    assert torch.equal(back, drawn())
    above = X[0] > (0 if signed else 1e-8) * X.max() if not signed else torch.ones(64, dtype=torch.bool)
    error = (back.mean(0) - X[0]).abs()[above]
    deviation = back.std(0)[above] / 4000**0.5
    assert bool((error <= 5 * deviation + 1e-6 * X.abs().max()).all())  # 5 deviations of the mean


def test_pack_refuses() -> None:
    for X, options in (
        (torch.ones(4), {"bits": 3}),
        (torch.ones(5), {"bits": 4}),
        (torch.ones(4), {"block": 0}),
        (torch.tensor(1.0), {}),
        (torch.ones(4, dtype=torch.int64), {}),
    ):
        with pytest.raises(InputError, match="pack"):
            pack(X, **options)  # type: ignore[arg-type]


def test_stochastic_rounding_is_to_neighbours_with_the_right_mean() -> None:
    X = gaussian(50).expand(4000, 50)
    rounded = round_stochastically(X, torch.bfloat16, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    down = (X.contiguous().view(torch.int32) & -0x10000).view(torch.float32)  # toward zero
    up = ((X.contiguous().view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    back = rounded.float()
    assert bool(((back == down) | (back == up)).all())
    spread = back.std(0) / 4000**0.5
    assert bool(((back.mean(0) - X[0]).abs() <= 5 * spread + 1e-7).all())
    nearest = X[0].bfloat16().float()
    assert float((back.mean(0) - X[0]).norm()) < 0.1 * float((nearest - X[0]).norm())


def test_stochastic_rounding_of_what_needs_none() -> None:
    exact = gaussian(37).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), torch.bfloat16), exact)
    assert round_stochastically(exact) is exact
    odd = torch.tensor([0.0, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(odd).float(), odd)
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert bool(round_stochastically(nan).isnan().all())
    first = round_stochastically(gaussian(7, 3).double(), torch.bfloat16, torch.Generator().manual_seed(1))
    assert torch.equal(first, round_stochastically(gaussian(7, 3), torch.bfloat16, torch.Generator().manual_seed(1)))
    for X, dtype in ((torch.ones(2), torch.float16), (torch.ones(2, dtype=torch.int64), torch.bfloat16)):
        with pytest.raises(InputError, match="round_stochastically"):
            round_stochastically(X, dtype)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_parts_of_large_tensors_are_packed_alike(bits: int, signed: bool) -> None:
    X = gaussian(300, 7, 100).transpose(0, 2)  # more than is worked on at once, and not contiguous
    X = X if signed else X.square()
    codes, scales = pack(X, bits=bits, signed=signed, block=64)
    back = unpack(codes, scales, bits=bits, signed=signed, block=64)
    for i in (0, 41, 99):
        alone = pack(X[i], bits=bits, signed=signed, block=64)
        assert torch.equal(codes[i], alone[0])
        assert torch.equal(scales[i], alone[1])
        assert torch.equal(back[i], unpack(*alone, bits=bits, signed=signed, block=64))
