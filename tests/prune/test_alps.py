"""ALPS: steps against the stationary equation, patterns, and what it must never be worse than."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.prune import alps, refit, sparsegpt
from eckart.prune.alps import _back, _eigen, _turned
from eckart.prune.refit import Metric


def problem(m: int = 12, n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W, X, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, n), (80, n), (60, m)))
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    g = g @ torch.randn(m, m, generator=generator, dtype=torch.float64)
    return W, X.T @ X / 80, g.T @ g / 60


def cost(E: Tensor, sigma: Tensor, G: Tensor | None) -> float:
    E = E.double()
    return float(torch.trace(E @ sigma @ E.T if G is None else G @ E @ sigma @ E.T))


@pytest.mark.parametrize("form", ["inputs", "diagonal", "full"])
@pytest.mark.parametrize("seed", range(4))
def test_less_error_than_sparsegpt_refitted(form: str, seed: int) -> None:
    W, sigma, G = problem(seed=seed)
    gradient = {"inputs": None, "diagonal": G.diagonal(), "full": G}[form]
    mask = sparsegpt(W, sigma, pattern="2:4")[1]
    before = refit(W, mask, sigma, gradient=gradient, iterations=200)
    S, mask = alps(W, sigma, gradient=gradient)
    full = torch.diag(gradient) if gradient is not None and gradient.ndim == 1 else gradient
    assert bool((mask.view(12, 4, 4).sum(-1) == 2).all())
    assert not S[~mask].any()
    assert cost(W - S, sigma, full) < cost(W - before, sigma, full)


def test_a_round_solves_its_equation() -> None:
    """Ĝ S Σ̂ + ρ S = Ĝ T Σ̂ + ρ D − V, by the two eigenbases."""
    W, sigma, G = problem()
    metric, rho = Metric(sigma, G, torch.float64), 0.3
    assert metric.outputs is not None
    (s, Q), (g, P) = _eigen(metric.inputs), _eigen(metric.outputs)
    right = metric.gradient(metric.scaled(W)) + W
    S = _back(_turned(right, P, Q) / (g.unsqueeze(1) * s + rho), P, Q)
    torch.testing.assert_close(metric.gradient(S) + rho * S, right)


@pytest.mark.parametrize(
    ("pattern", "keep"), [("keep 1 of 8", None), ("row", 0.25), ("unstructured", 0.3), ("runs of 4", 0.5)]
)
def test_patterns(pattern: str, keep: float | None) -> None:
    W, sigma, G = problem()
    S, mask = alps(W, sigma, keep, pattern, gradient=G)
    share = 1 / 8 if keep is None else keep
    assert int(mask.sum()) == int(share * W.numel())
    assert not S[~mask].any()
    plain = refit(W, mask, sigma, gradient=G, iterations=200)
    assert cost(W - S, sigma, G) < 1.02 * cost(W - plain, sigma, G)  # what comes back is fitted


def test_never_worse_than_its_start() -> None:
    W, sigma, G = problem()
    best, _ = alps(W, sigma, gradient=G)
    again, mask = alps(W, sigma, gradient=G, start=best, rounds=1)
    assert cost(W - again, sigma, G) <= cost(W - best, sigma, G) * (1 + 1e-9)
    assert bool((mask.view(12, 4, 4).sum(-1) == 2).all())


def test_weights_that_obey_the_pattern_stay() -> None:
    W, sigma, G = problem()
    W = W * sparsegpt(W, sigma, pattern="2:4")[1]
    S, _ = alps(W, sigma, gradient=G)
    torch.testing.assert_close(S, W)


@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 0.05), (torch.bfloat16, 0.3)])
def test_dtypes(dtype: torch.dtype, room: float) -> None:
    W, sigma, G = problem()
    exact, S = alps(W, sigma, gradient=G)[0], alps(W.to(dtype), sigma, gradient=G)[0]
    assert S.dtype == dtype
    assert cost(W - S, sigma, G) == pytest.approx(cost(W - exact, sigma, G), rel=room)


def test_singular_moments_and_unseen_inputs() -> None:
    W, sigma, G = problem()
    sigma[3], sigma[:, 3], G[2], G[:, 2] = 0, 0, 0, 0
    S, _ = alps(W, sigma, gradient=G)
    assert bool(S.isfinite().all())


def test_bad_input() -> None:
    W, sigma, G = problem()
    with pytest.raises(InputError, match=r"(?s)second.*gradient.*start.*inputs are no multiple.*rounds.*rho"):
        alps(W, sigma[:2], pattern="2:5", gradient=G[:2], start=W[:2], rounds=0, rho=0.0)
    with pytest.raises(NotFiniteError, match="second"):
        alps(W, sigma * torch.nan)
