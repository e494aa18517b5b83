"""SparseGPT against optimal brain surgery with an inverse taken anew for every column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.prune import refit, sparsegpt
from eckart.prune.refit import row_errors


def problem(m: int = 5, n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    X = torch.randn(80, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return W, X.T @ X / 80


def naive(W: Tensor, sigma: Tensor, keep: float, size: int, group: int = 0) -> Tensor:
    """Column by column; H⁻¹ of the columns that are left, inverted at each step."""
    m, n = W.shape
    W, H = W.clone(), sigma + 0.01 * sigma.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    mask = torch.ones(m, n, dtype=torch.bool)

    def pivot(j: int) -> float:
        return float(torch.linalg.inv(H[j:, j:])[0, 0])

    for j in range(n):
        if j % size == 0:
            stop = min(j + size, n)
            scores = W[:, j:stop].square() / torch.tensor([pivot(c) for c in range(j, stop)], dtype=torch.float64)
            if group:
                order = scores.argsort(1, descending=True)
                mask[:, j:stop] = False
                mask[:, j:stop].scatter_(1, order[:, :group], True)
            else:
                kept = scores.flatten().argsort(descending=True)[: int(keep * scores.numel())]
                flat = torch.zeros(scores.numel(), dtype=torch.bool)
                flat[kept] = True
                mask[:, j:stop] = flat.view_as(scores)
        inverse = torch.linalg.inv(H[j:, j:])
        gone = ~mask[:, j]
        W[gone, j:] -= (W[gone, j] / inverse[0, 0]).outer(inverse[0])
    return W * mask


@pytest.mark.parametrize("block", [4, 7, 16, 128])
def test_follows_the_definition(block: int) -> None:
    W, sigma = problem()
    S, mask = sparsegpt(W, sigma, 0.5, block=block)
    torch.testing.assert_close(S, naive(W, sigma, 0.5, min(block, 16)))
    assert torch.equal(S != 0, mask)


@pytest.mark.parametrize("block", [4, 6, 128])
def test_two_of_four(block: int) -> None:
    W, sigma = problem()
    S, mask = sparsegpt(W, sigma, pattern="2:4", block=block)
    torch.testing.assert_close(S, naive(W, sigma, 0.5, 4, group=2))
    assert bool((mask.view(5, 4, 4).sum(-1) == 2).all())


def test_rows_and_dtype() -> None:
    W, sigma = problem()
    S, mask = sparsegpt(W.float(), sigma, 0.25, "row")
    assert S.dtype == torch.float32
    assert bool((mask.sum(1) == 4).all())


def test_refit_from_there_is_no_worse() -> None:
    W, sigma = problem()
    S, mask = sparsegpt(W, sigma, 0.5)
    again = refit(W, mask, sigma, start=S)
    assert bool((row_errors(W - again, sigma) <= row_errors(W - S, sigma)).all())


def test_inputs_that_were_never_seen_go() -> None:
    W, sigma = problem()
    sigma[3], sigma[:, 3] = 0, 0
    S, _ = sparsegpt(W, sigma, 0.5)
    assert not S[:, 3].any()


def test_wrong_options_are_said_at_once() -> None:
    W, sigma = problem()
    with pytest.raises(InputError, match=r"(?s)second.*runs of 4.*damping.*block"):
        sparsegpt(W, sigma[:2], 0.5, "runs of 4", damping=0, block=0)
    with pytest.raises(InputError, match="no multiple"):
        sparsegpt(W, sigma, pattern="2:5")
    with pytest.raises(InputError, match="positive semi-definite"):
        sparsegpt(W, -sigma, 0.5)
