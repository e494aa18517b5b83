"""Rounding to integer grids, against plain loops written from the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import Rounded, round_groups, rounding


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, tokens: int, seed: int = 5) -> Tensor:
    """E[x xᵀ] of correlated inputs of unequal size; singular for fewer tokens than inputs."""
    X = draw(tokens, n, seed=seed) @ draw(n, n, seed=seed + 1)
    X = X * draw(n, seed=seed + 2).exp()
    return X.T @ X / tokens


def rise(W: Tensor, rounded: Rounded, second: Tensor) -> float:
    D = W.double() - rounded.dense().double()
    return float(((D @ second) * D).sum())


def naive_feedback(W: Tensor, grid: Rounded, second: Tensor, damping: float, order: str) -> Tensor:
    """Codes, one column after the other, with a fresh inverse over the free columns each time."""
    m, n = W.shape
    H = second + damping * second.diagonal().mean() * torch.eye(n).double()
    columns = sorted(range(n), key=lambda j: -float(second[j, j])) if order == "falling" else list(range(n))
    W, codes = W.clone(), torch.zeros(m, n, dtype=torch.uint8)
    for done, j in enumerate(columns):
        free = columns[done:]
        inverse = torch.linalg.inv(H[free][:, free])
        g = j // grid.group
        s, z = grid.scale[:, g].double(), grid.zero[:, g].double()
        codes[:, j] = (W[:, j] / s + z).round().clamp(0, 2**grid.bits - 1).to(torch.uint8)
        error = W[:, j] - (s * (codes[:, j] - z)).to(grid.scale.dtype).double()
        for k, other in enumerate(free[1:], 1):
            W[:, other] -= error * inverse[0, k] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), [(2, 4), (3, 5), (4, None), (5, 1), (8, 7), (4, 99)])
def test_nearest_chooses_the_nearest_point_of_the_stored_grid(bits, group, dtype, symmetric):
    W = draw(6, 17).to(dtype)
    got = round_groups(W, bits=bits, group=group, symmetric=symmetric, clip=False)
    width = 17 if group is None else min(group, 17)
    assert got.codes.dtype == got.zero.dtype == torch.uint8
    assert got.scale.dtype == got.dense().dtype == dtype
    assert got.scale.shape == got.zero.shape == (6, -(-17 // width))
    points = torch.arange(2**bits).double()
    for i in range(6):
        for j in range(17):
            part = W[i, j // width * width :][:width].double()
            s, z = got.scale[i, j // width].double(), got.zero[i, j // width].double()
            if symmetric:
                assert z == 2 ** (bits - 1)
                torch.testing.assert_close(s, part.abs().max() / (2 ** (bits - 1) - 1), rtol=1e-2, atol=0)
            else:
                span = part.max().clamp(min=0) - part.min().clamp(max=0)
                torch.testing.assert_close(s, span / (2**bits - 1), rtol=1e-2, atol=0)
            value = s * (points - z)
            best = (value - W[i, j].double()).abs().min()
            assert (value[got.codes[i, j].long()] - W[i, j].double()).abs() <= best + 1e-9
            assert got.dense()[i, j] == value[got.codes[i, j].long()].to(dtype)


@pytest.mark.parametrize("order", ["falling", "natural"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "tokens"), [(2, 8, 100), (3, None, 7), (4, 5, 100), (8, 8, 3)])
def test_feedback_is_that_of_the_naive_loop(bits, group, tokens, dtype, order, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", 6)
    monkeypatch.setattr(rounding, "_CHUNK", 4 * 21)
    W, second = draw(9, 21).to(dtype), moment(21, tokens)
    got = round_groups(W, bits=bits, group=group, second=second, order=order, damping=0.02)
    want = naive_feedback(W.double(), got, second, 0.02, order)
    assert torch.equal(got.codes, want)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("tokens", [9, 400])
def test_feedback_lowers_the_error_that_it_is_about(tokens, clip):
    W, second = draw(20, 48), moment(48, tokens)
    for bits in (2, 3, 4, 8):
        nearest = round_groups(W, bits=bits, group=16, clip=clip)
        fed_back = round_groups(W, bits=bits, group=16, clip=clip, second=second)
        assert rise(W, fed_back, second) < 0.8 * rise(W, nearest, second)


def test_without_correlation_feedback_is_the_nearest():
    W, second = draw(5, 12), torch.rand(12, dtype=torch.float64).diag()
    fed_back = round_groups(W, bits=3, group=4, second=second, clip=False)
    assert torch.equal(fed_back.codes, round_groups(W, bits=3, group=4, clip=False).codes)
    nothing = round_groups(W, bits=3, group=4, second=torch.zeros(12, 12), clip=False)
    assert torch.equal(nothing.codes, fed_back.codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_clip_search_never_raises_the_error_it_weighs(symmetric):
    W, second = draw(30, 40) ** 3, moment(40, 100)
    for bits in (2, 4):
        errors = [
            (round_groups(W, bits=bits, group=20, clip=clip, symmetric=symmetric).dense() - W).square().view(30, 2, 20)
            for clip in (True, False)
        ]
        assert (errors[0].sum(-1) <= errors[1].sum(-1) + 1e-12).all()
        assert errors[0].sum() < errors[1].sum()
        plain, weighted = (round_groups(W, bits=bits, group=20, second=s).scale for s in (None, second))
        assert not torch.equal(plain, weighted)


def test_groups_of_zeros_of_constants_and_of_tiny_numbers():
    W = torch.zeros(4, 8)
    W[1] = 3.0
    W[2] = -3.0
    W[3] = 1e-42  # below the smallest scale of float32
    for symmetric in (False, True):
        got = round_groups(W, bits=4, group=4, symmetric=symmetric).dense()
        torch.testing.assert_close(got, W, rtol=1e-6, atol=1e-38)
        assert torch.equal(got[0], W[0])


def test_numbers_on_a_grid_stay_as_they_are():
    codes = torch.randint(0, 16, (5, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, ::10], codes[:, 1::10] = 0, 15
    W = (codes.double() - 6) * 0.25
    got = round_groups(W, bits=4, group=10)
    assert torch.equal(got.dense(), W)
    again = round_groups(got.dense(), bits=4, group=10, second=moment(30, 50))
    assert torch.equal(again.codes, got.codes)


def test_integers_are_chosen_for_the_scale_that_is_stored():
    """With scales rounded after the integers were chosen, the error would be larger."""
    W = draw(40, 64)
    stored = round_groups(W, bits=8, symmetric=True, clip=False, dtype=torch.bfloat16)
    exact = round_groups(W, bits=8, symmetric=True, clip=False)
    scale, steps = stored.scale.double(), exact.codes.double() - 128
    assert torch.equal(scale, exact.scale.bfloat16().double())
    ours, late = (scale * (stored.codes.double() - 128) - W).abs(), (scale * steps - W).abs()
    assert (ours <= late).all()
    assert ours.norm() < late.norm()


def test_everything_wrong_is_said_at_once():
    with pytest.raises(InputError, match="6 problems") as error:
        round_groups(draw(2, 3), bits=9, group=0, second=draw(2, 2), order="up", damping=0.0, dtype=torch.int8)
    for word in ("bits", "group", "second", "order", "damping", "float16"):
        assert word in str(error.value)
    for bad in (draw(3), draw(0, 3), draw(2, 3, 4)):
        with pytest.raises(InputError, match="W: expected a matrix"):
            round_groups(bad, bits=4)
    for bits in (1, 9, 4.0, True):
        with pytest.raises(InputError, match="bits"):
            round_groups(draw(2, 3), bits=bits)
    with pytest.raises(InputError, match="semi-definite"):
        round_groups(draw(2, 3), bits=4, second=-torch.eye(3))
    with pytest.raises(InputError, match="does not fit into"):
        round_groups(1e7 * draw(2, 3), bits=4, dtype=torch.float16)
    for value in (float("nan"), float("inf")):
        W = draw(2, 3)
        W[1, 1] = value
        with pytest.raises(NotFiniteError, match="W"):
            round_groups(W, bits=4)
        with pytest.raises(NotFiniteError, match="second"):
            round_groups(draw(2, 2), bits=4, second=W[:, :2])
