"""Refit on a mask, against rows solved one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.prune import corrected_bias, refit
from eckart.prune.refit import row_errors


def problem(m: int = 7, n: int = 90, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, a mask of unequal rows, Σ, G."""
    generator = torch.Generator().manual_seed(seed)
    W, X, g, chance = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, n), (tokens, n), (50, m), (m, n))
    )
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64) + 0.5
    return W, chance > torch.linspace(-1, 1, m).unsqueeze(1), X.T @ X / tokens, g.T @ g / 50


def row_by_row(W: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
    """The definition: Σ_JJ s_J = (W Σ)_J."""
    S = torch.zeros_like(W)
    for i in range(len(W)):
        J = mask[i].nonzero().flatten()
        if len(J):
            S[i, J] = torch.linalg.solve(sigma[J][:, J], (W[i] @ sigma)[J])
    return S


@pytest.mark.parametrize("n", [20, 64, 65, 90])  # Cholesky, and conjugate gradients
def test_is_the_solution_of_every_row(n: int) -> None:
    W, mask, sigma, _ = problem(n=n)
    mask[2] = False
    torch.testing.assert_close(refit(W, mask, sigma, iterations=400), row_by_row(W, mask, sigma), rtol=1e-5, atol=1e-6)


def test_gradient_couples_the_rows() -> None:
    W, mask, sigma, G = problem(m=5, n=12)
    S = refit(W, mask, sigma, gradient=G, iterations=400)
    where = mask.flatten().nonzero().flatten()
    K = torch.kron(G, sigma)
    right = (K @ W.flatten())[where]
    expected = torch.zeros(W.numel(), dtype=torch.float64)
    expected[where] = torch.linalg.solve(K[where][:, where], right)
    torch.testing.assert_close(S.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_diagonal_gradient_changes_nothing() -> None:
    W, mask, sigma, G = problem()
    assert torch.equal(refit(W, mask, sigma, gradient=G.diagonal()), refit(W, mask, sigma))


def test_diagonal_second_keeps_the_weights() -> None:
    W, mask, sigma, _ = problem()
    assert torch.equal(refit(W, mask, sigma.diagonal()), W * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 90])
def test_no_row_is_worse_than_its_start(dtype: torch.dtype, n: int) -> None:
    W, mask, sigma, _ = problem(n=n)
    W = W.to(dtype)
    S = refit(W, mask, sigma, iterations=3)
    assert S.dtype == dtype
    assert not S[~mask].any()
    before, after = (row_errors(W.double() - x.double(), sigma) for x in (W * mask, S))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.8 * float(before.sum())


def test_start_at_the_solution_stays() -> None:
    W, mask, sigma, _ = problem()
    best = row_by_row(W, mask, sigma)
    again = refit(W, mask, sigma, start=best, iterations=2)
    assert float(row_errors(W - again, sigma).sum()) <= float(row_errors(W - best, sigma).sum()) * (1 + 1e-12)


def test_singular_moments_and_dead_inputs() -> None:
    """Three directions among ten inputs, one input always 0: five weights a row are enough for all of it."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(50, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 10, generator=generator, dtype=torch.float64
    )
    X[:, 0] = 0
    W = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :5] = True
    S = refit(W, mask, X.T @ X / 50)
    assert float((X @ (S - W).T).norm()) < 1e-4 * float((X @ W.T).norm())
    zero = refit(W, mask, torch.zeros(10, 10, dtype=torch.float64))
    assert torch.equal(zero, W * mask)


def test_scale_of_inputs_does_not_matter() -> None:
    W, mask, sigma, _ = problem()
    s = torch.logspace(-6, 6, 90, dtype=torch.float64)
    S = refit((W / s).float(), mask, sigma * s * s.unsqueeze(1), iterations=5)
    expected = refit(W.float(), mask, sigma, iterations=5)
    torch.testing.assert_close(S * s.float(), expected, rtol=1e-3, atol=1e-4)  # float32, five steps


def test_bias_takes_up_the_mean() -> None:
    W, mask, _, _ = problem()
    X = torch.randn(100, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1
    bias = torch.zeros(7)
    S = W * mask
    outputs = X @ S.T + corrected_bias(W, S, bias, X.mean(0))
    torch.testing.assert_close(outputs.mean(0), (X @ W.T).mean(0), rtol=1e-5, atol=1e-5)


def test_everything_wrong_is_said_at_once() -> None:
    W, mask, sigma, _ = problem()
    with pytest.raises(InputError, match=r"(?s)3 problems.*mask.*second.*iterations"):
        refit(W, mask.double(), sigma[:3], iterations=0)
    with pytest.raises(NotFiniteError, match="second"):
        refit(W, mask, sigma * float("nan"))
    with pytest.raises(InputError, match="matrix"):
        refit(W[0], mask[0], sigma)
