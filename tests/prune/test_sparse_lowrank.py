"""Sparse plus low rank: every step lowers the objective, and the product is the best one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.prune import refit, sparse_lowrank


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W, X, g, chance = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 12), (60, 12), (40, 9), (9, 12))
    )
    X = X @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    return W, chance > 0, X.T @ X / 60, g.T @ g / 40


def cost(E: Tensor, sigma: Tensor, G: Tensor | None = None) -> float:
    G = torch.eye(len(E), dtype=E.dtype) if G is None else G
    return float(torch.trace(G @ E @ sigma @ E.T))


def test_one_round_is_the_truncated_svd_of_the_weighted_rest() -> None:
    W, mask, sigma, _ = problem()
    S0 = refit(W, mask, sigma)
    S, product = sparse_lowrank(W, mask, sigma, 2, start=S0, rounds=1)
    assert torch.equal(S, S0)
    L = torch.linalg.cholesky(sigma)
    U, s, Vh = torch.linalg.svd((W - S0) @ L, full_matrices=False)
    best = (U[:, :2] * s[:2]) @ Vh[:2] @ torch.linalg.inv(L)
    torch.testing.assert_close(product.dense(), best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_rounds_never_raise_the_error(weighted: bool) -> None:
    W, mask, sigma, G = problem()
    gradient = G if weighted else None
    costs = []
    for rounds in range(1, 8):
        S, product = sparse_lowrank(W, mask, sigma, 2, gradient=gradient, rounds=rounds)
        assert not S[~mask].any()
        assert product.rank == 2
        costs.append(cost(W - S - product.dense(), sigma, gradient))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_bad_input() -> None:
    W, mask, sigma, _ = problem()
    with pytest.raises(InputError, match=r"(?s)rank.*rounds"):
        sparse_lowrank(W, mask, sigma, 10, rounds=0)
