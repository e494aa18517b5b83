"""Sums in blocks and draws in runs of classes, against the plain way of computing them."""

from __future__ import annotations

import pytest
import torch

from eckart.moments.accumulators import BLOCK, GradientSums, InputSums, add_gram, symmetrise
from eckart.moments.losses import draw


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_a_gram_are_those_of_the_whole(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    parts = [torch.randn(20, width, generator=generator).to(dtype) for _ in range(3)]
    total = torch.zeros(width, width, dtype=torch.float64)
    for weight, rows in enumerate(parts, start=1):
        add_gram(total, rows, float(weight))
    symmetrise(total)
    exact = sum(weight * rows.double().T @ rows.double() for weight, rows in enumerate(parts, start=1))
    assert torch.equal(total, total.T)
    # float32 products of 20 numbers of size 1, times weights up to 3
    torch.testing.assert_close(total, exact, rtol=0.0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_one_block_beyond_float32_leaves_the_others_alone() -> None:
    rows = torch.randn(20, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    rows[:, -1] = 1e30
    total = torch.zeros(2 * BLOCK, 2 * BLOCK, dtype=torch.float64)
    add_gram(total, rows)
    symmetrise(total)
    exact = rows.double().T @ rows.double()
    scale = exact.diagonal().sqrt()
    assert float(((total - exact) / scale.outer(scale)).abs().max()) < 1e-6


def test_scales_are_the_same_with_and_without_fisher_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    g, x = (torch.randn(30, width, generator=generator) for width in (7, 5))
    picks = (torch.arange(0, 30, 2), torch.arange(1, 30, 2))
    found = []
    for fisher in (False, True):
        sums = GradientSums(1, 7, 5, full=True, fisher=fisher)
        assert sums.add(0, g, picks, x if fisher else None, 0.5)
        found.append(sums)
    assert torch.equal(found[0].scale, found[1].scale)
    squares = g.double().square()
    torch.testing.assert_close(found[0].scale.sum(), 0.5 * squares.sum())
    rows, columns = found[1].rows, found[1].columns
    assert rows is not None
    assert columns is not None
    torch.testing.assert_close(rows.sum((0, 1)), 0.5 * x.double().square().sum(1) @ squares)
    torch.testing.assert_close(columns.sum((0, 1)), 0.5 * squares.sum(1) @ x.double().square())
    infinite = torch.where(torch.arange(7) == 3, torch.inf, g)
    assert not GradientSums(1, 7, 5, full=True, fisher=False).add(0, infinite, picks, None, 1.0)


def test_inputs_of_bfloat16_are_summed_in_float64() -> None:
    x = torch.full((1000, 2), 1.0 + 2**-7, dtype=torch.bfloat16)
    sums = InputSums(1, 2, matrix=True)
    assert sums.add(0, x, (torch.arange(1000), torch.arange(0)))
    assert sums.total[0, 0].tolist() == [1000 * (1.0 + 2**-7)] * 2


@pytest.mark.parametrize("classes", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_inverts_the_cumulated_softmax(classes: int, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(2000, classes, generator=torch.Generator().manual_seed(classes), dtype=dtype)
    logits[:, classes // 2 + 1 :: 3] = -torch.inf  # classes that cannot be drawn
    drawn = draw(logits, torch.Generator().manual_seed(5))
    uniform = torch.rand(2000, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cumulated = logits.softmax(-1).double().cumsum(-1)
    plain = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    assert int((drawn != plain).sum()) <= 1  # where a number falls on an edge to rounding
    assert bool((logits.gather(1, drawn[:, None]) > -torch.inf).all())


def test_no_rows_and_no_padding() -> None:
    assert draw(torch.zeros(0, 10), torch.Generator()).shape == (0,)
