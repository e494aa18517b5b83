"""The inverse of the empirical Fisher matrix, against the dense inverse in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import mfac
from eckart.linalg.mfac import (
    GradientWindow,
    InverseFisher,
    block_runs,
    gram_blocks,
    newest_blockwise,
    push_blockwise,
    ridge_solve,
)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(G: Tensor, damping: float, block: int | None) -> Tensor:
    """F, written down; ``G`` (m, d) holds all rows that count."""
    m, d = G.shape
    F = G.double().T @ G.double() / m + damping * torch.eye(d, dtype=torch.float64)
    if block is None:
        return F
    number = torch.arange(d) // block
    return F * (number[:, None] == number)


CASES = [(6, 40, None), (64, 40, None), (6, 43, 10), (16, 43, 10), (10, 43, 10), (1, 5, 1), (3, 7, 100)]


@pytest.mark.parametrize(("m", "d", "block"), CASES)
def test_static_solver_is_the_dense_inverse(m: int, d: int, block: int | None) -> None:
    G, x = gaussian(m, d), gaussian(d, seed=1)
    inverse = torch.linalg.inv(dense(G, 0.03, block))
    found = InverseFisher(G, 0.03, block=block)
    torch.testing.assert_close(found.solve(x), inverse @ x)
    torch.testing.assert_close(found.diagonal(), inverse.diagonal())
    torch.testing.assert_close(found.column(d - 1), inverse[:, d - 1])
    torch.testing.assert_close(found.energy(x), x @ dense(G, 0.03, block) @ x / 2)


def test_parts_of_many_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    G, x = gaussian(4, 57), gaussian(57, seed=1)
    whole = InverseFisher(G, 0.1, block=6)
    expected = whole.solve(x), whole.diagonal()
    monkeypatch.setattr(mfac, "CHUNK", 50)  # two blocks at a time
    torch.testing.assert_close((whole.solve(x), whole.diagonal()), expected)


@pytest.mark.parametrize(("m", "d", "block"), CASES)
def test_joint_surgery_is_the_constrained_minimum(m: int, d: int, block: int | None) -> None:
    G, w = gaussian(m, d), gaussian(d, seed=1)
    drop = gaussian(d, seed=2) < 0
    F = dense(G, 0.03, block)
    kept = ~drop
    expected = -w
    expected[kept] = torch.linalg.solve(F[kept][:, kept], F[kept][:, drop] @ w[drop])
    found = InverseFisher(G, 0.03, block=block).surgery(w, drop)
    torch.testing.assert_close(found, expected)
    assert (w + found)[drop].abs().max() == 0


def test_single_surgery_is_the_sum_of_single_updates() -> None:
    G, w = gaussian(5, 12), gaussian(12, seed=1)
    drop = torch.zeros(12, dtype=torch.bool)
    drop[[2, 7]] = True
    inverse = torch.linalg.inv(dense(G, 0.03, None))
    expected = -inverse[:, 2] * w[2] / inverse[2, 2] - inverse[:, 7] * w[7] / inverse[7, 7]
    expected[drop] = -w[drop]
    torch.testing.assert_close(InverseFisher(G, 0.03).surgery(w, drop, joint=False), expected)


def test_of_one_weight_both_surgeries_agree() -> None:
    G, w = gaussian(5, 12), gaussian(12, seed=1)
    drop = torch.zeros(12, dtype=torch.bool)
    drop[4] = True
    found = InverseFisher(G, 0.03)
    torch.testing.assert_close(found.surgery(w, drop), found.surgery(w, drop, joint=False))
    # and the loss rises by the score of the optimal brain surgeon
    torch.testing.assert_close(found.energy(found.surgery(w, drop)), w[4] ** 2 / (2 * found.diagonal()[4]))


@pytest.mark.parametrize("steps", [3, 6, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_window_holds_the_last_m_gradients(dtype: torch.dtype, steps: int) -> None:
    m, sizes = 6, (11, 4)
    buffers = [torch.zeros(m, size, dtype=dtype) for size in sizes]
    window = GradientWindow(buffers, torch.zeros(m, m, dtype=torch.float64))
    rows = [gaussian(sum(sizes), seed=step).to(dtype) for step in range(steps)]
    for step, g in enumerate(rows):
        window.push(list(g.split(sizes)), step % m)
        found = torch.cat(window.newest(step % m, 0.05))
    last = torch.stack(rows[-m:]).double()
    last = torch.cat([last, last.new_zeros(m - last.shape[0], 15)])  # rows not written yet count as zero
    expected = torch.linalg.solve(dense(last, 0.05, None), rows[-1].double())
    # float32 has 7 digits, and buffers in bfloat16 are multiplied in float32
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(window.gram, window.gram.T, rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 3, 6, 7, 15])
def test_blockwise_window_is_dense_by_block(block: int) -> None:
    m, d = 6, 17
    runs = block_runs(d, block)
    buffer = torch.zeros(m, d, dtype=torch.float64)
    gram = torch.zeros(gram_blocks(runs, m), m, m, dtype=torch.float64)
    for step in range(9):
        g = gaussian(d, seed=step)
        push_blockwise(buffer, gram, g, step % m, runs)
        found = newest_blockwise(buffer, gram, step % m, 0.05, runs, torch.float64)
    expected = torch.linalg.solve(dense(torch.stack([gaussian(d, seed=s) for s in range(3, 9)]), 0.05, block), g)
    torch.testing.assert_close(found, expected)


def test_a_tiny_damping_loses_no_digits_in_a_window_of_float32() -> None:
    """The difference (x − …)/λ would have none left: λ is 1e-9 of the curvature."""
    m, d = 8, 200
    window = GradientWindow([torch.zeros(m, d)], torch.zeros(m, m, dtype=torch.float64))
    rows = [100 * gaussian(d, seed=step, dtype=torch.float32) for step in range(m)]
    for step, g in enumerate(rows):
        window.push([g], step)
    found = window.newest(m - 1, 1e-5)[0]
    G = torch.stack(rows).double()
    inner = G @ G.T + m * 1e-5 * torch.eye(m, dtype=torch.float64)
    expected = m * G.T @ torch.linalg.inv(inner)[:, -1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("damping", [1e-3, 1e-30])
def test_repeated_gradients_are_solved_all_the_same(damping: float) -> None:
    """GGᵀ of rank 1. A damping below the rounding of GGᵀ is raised to it, so that it can be factorised."""
    g = gaussian(50, dtype=torch.float32)
    window = GradientWindow([torch.zeros(5, 50)], torch.zeros(5, 5, dtype=torch.float64))
    for row in range(5):
        window.push([g], row)
    (found,) = window.newest(4, damping)
    assert bool(torch.isfinite(found).all())
    if damping == 1e-3:  # F is ggᵀ + λI, so F⁻¹g = g/(λ + ‖g‖²)
        torch.testing.assert_close(found, g / (damping + g.square().sum()), rtol=2e-2, atol=0)


def test_ridge_solve_of_a_stack_and_of_nan() -> None:
    A = gaussian(3, 4, 4)
    A, B = A @ A.mT, gaussian(3, 4, 2, seed=1)
    found = ridge_solve(A, B, 0.1, 0.0)
    torch.testing.assert_close((A + 0.1 * torch.eye(4, dtype=A.dtype)) @ found, B)
    with pytest.raises(NotFiniteError, match="NaN or Inf"):
        ridge_solve(torch.full((2, 2), torch.nan), torch.ones(2, 1), 0.1, 0.0)


def test_bad_input_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        InverseFisher(torch.zeros(3), 0.0, block=0, dtype=torch.bfloat16)
    for word in ("(m, d)", "damping", "block", "dtype"):
        assert word in str(caught.value)
    with pytest.raises(NotFiniteError):
        InverseFisher(torch.full((2, 3), torch.inf), 1.0)
    found = InverseFisher(torch.ones(2, 3), 1.0)
    with pytest.raises(InputError, match=r"expected \(3,\)"):
        found.solve(torch.ones(4))
    with pytest.raises(InputError, match="bool"):
        found.surgery(torch.ones(3), torch.ones(3))
    with pytest.raises(InputError, match="index"):
        found.column(3)


def test_runs_of_blocks() -> None:
    assert block_runs(10, None) == [(0, 1, 10)]
    assert block_runs(10, 4) == [(0, 2, 4), (8, 1, 2)]
    assert block_runs(8, 4) == [(0, 2, 4)]
    assert block_runs(0, 4) == []
