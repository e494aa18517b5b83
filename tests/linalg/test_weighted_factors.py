"""tr(G ΔW Σ ΔWᵀ) is minimal, and measured directly it is what the error curve says, at every rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import weighted_factors

SHAPES = [(6, 11), (11, 6), (7, 7), (1, 5), (5, 1), (1, 1)]
METRICS = ["none", "diagonal", "full"]


def moment(kind: str, n: int, generator: torch.Generator) -> Tensor | None:
    X = torch.randn(4 * n, n, dtype=torch.float64, generator=generator) * torch.linspace(0.2, 2, n)
    S = X.T @ X / (4 * n)
    return {"none": None, "diagonal": S.diagonal(), "full": S}[kind]


def matrix(S: Tensor | None, n: int) -> Tensor:
    if S is None:
        return torch.eye(n, dtype=torch.float64)
    return torch.diag(S) if S.ndim == 1 else S


def objective(G: Tensor, D: Tensor, S: Tensor) -> float:
    return float(torch.trace(G @ D @ S @ D.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("second", METRICS)
@pytest.mark.parametrize("gradient", METRICS)
def test_curve_is_the_measured_and_least_error(shape: tuple[int, int], second: str, gradient: str) -> None:
    m, n = shape
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(m, n, dtype=torch.float64, generator=generator)
    sigma, G = moment(second, n, generator), moment(gradient, m, generator)
    S, H = matrix(sigma, n), matrix(G, m)
    found = weighted_factors(W, sigma, G)
    r = min(m, n)
    assert found.left.shape == (m, r)
    assert found.right.shape == (r, n)
    assert found.errors.shape == (r + 1,)
    # The slow way: whiten both sides, and let the SVD say what is least possible.
    whitened = torch.linalg.cholesky(H).T @ W @ torch.linalg.cholesky(S)
    least = torch.linalg.svdvals(whitened).square()
    for k in range(r + 1):
        D = W - found.left[:, :k] @ found.right[:k]
        total = float(found.errors[0])
        assert objective(H, D, S) == pytest.approx(float(found.errors[k]), abs=1e-10 * total)
        assert float(least[k:].sum()) == pytest.approx(float(found.errors[k]), abs=1e-10 * total)
        assert k == 0 or torch.linalg.matrix_rank(found.left[:, :k]) == k
    assert found.errors[-1] == 0
    torch.testing.assert_close(found.left @ found.right, W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_singular_metric_on_the_smaller_side(shape: tuple[int, int], kind: str) -> None:
    """Directions without weight come last, and full rank rebuilds W nevertheless."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, dtype=torch.float64, generator=generator)
    S = moment("full", 5, generator)
    if kind == "full":
        P = torch.eye(5, dtype=torch.float64) - 0.2  # takes the mean away, as a LayerNorm does
        S = P @ S @ P
    else:
        S = S.diagonal() * torch.tensor([1.0, 0, 1, 1, 0])
    sigma, G = (S, None) if n == 5 else (None, S)
    found = weighted_factors(W, sigma, G)
    weighted = 4 if kind == "full" else 3
    for k in range(6):
        D = W - found.left[:, :k] @ found.right[:k]
        assert objective(matrix(G, m), D, matrix(sigma, n)) == pytest.approx(
            float(found.errors[k]), abs=1e-10 * float(found.errors[0])
        )
    assert found.errors[weighted] <= 1e-12 * found.errors[0]
    assert found.errors[weighted - 1] > 1e-6 * found.errors[0]
    assert found.left.abs().max() < 100
    assert found.right.abs().max() < 100
    torch.testing.assert_close(found.left @ found.right, W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (20, 40)])
def test_singular_metric_on_the_larger_side_needs_no_root(shape: tuple[int, int]) -> None:
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, dtype=torch.float64, generator=generator)
    X = torch.randn(3, max(m, n), dtype=torch.float64, generator=generator)
    S = X.T @ X
    sigma, G = (S, None) if n > m else (None, S)
    found = weighted_factors(W, sigma, G)
    assert found.errors[3] <= 1e-12 * found.errors[0]
    assert (found.errors >= 0).all()
    assert (found.errors.diff() <= 0).all()
    torch.testing.assert_close(found.left @ found.right, W, rtol=1e-10, atol=1e-10)


def test_ill_conditioned_metric_does_not_blow_up() -> None:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(20, 40, dtype=torch.float64, generator=generator)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator))
    for decades in (4, 9, 11, 14, 20):
        G = (Q * torch.logspace(0, -decades, 20, dtype=torch.float64)) @ Q.T
        found = weighted_factors(W, gradient=(G + G.T) / 2)
        D = W - found.left[:, :10] @ found.right[:10]
        assert objective(G, D, torch.eye(40, dtype=torch.float64)) == pytest.approx(
            float(found.errors[10]), abs=1e-10 * float(found.errors[0])
        )
        torch.testing.assert_close(found.left @ found.right, W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_weight_and_zero_metrics(shape: tuple[int, int]) -> None:
    m, n = shape
    r = min(m, n)
    W = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nothing = weighted_factors(torch.zeros(m, n))
    assert nothing.left.isfinite().all()
    assert (nothing.left @ nothing.right == 0).all()
    assert (nothing.errors == 0).all()
    for sigma, G in [(torch.zeros(n, n), None), (None, torch.zeros(m)), (torch.zeros(n), torch.zeros(m, m))]:
        found = weighted_factors(W, sigma, G)
        assert found.left.shape == (m, r)
        assert (found.errors == 0).all()
        torch.testing.assert_close(found.left @ found.right, W)


def test_diagonal_of_a_large_table_is_never_a_matrix() -> None:
    """A 300,000² matrix would take 720 GB."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 300_000, generator=generator)
    frequency = torch.rand(300_000, generator=generator)
    found = weighted_factors(W, frequency)
    direct = (W.double().square() * frequency.double()).sum()
    assert float(found.errors[0]) == pytest.approx(float(direct), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float64(dtype: torch.dtype) -> None:
    W = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = weighted_factors(W)
    assert found.left.dtype == found.errors.dtype == torch.float64
    torch.testing.assert_close(found.left @ found.right, W.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused_by_name(bad: float) -> None:
    W, S, G = torch.ones(3, 4), torch.eye(4), torch.eye(3)
    for position, name in enumerate(("weight", "second", "gradient")):
        given = [W.clone(), S.clone(), G.clone()]
        given[position][1, 2] = bad
        with pytest.raises(NotFiniteError, match=rf"{name}: 1 of"):
            weighted_factors(*given)


def test_shapes_that_do_not_fit_are_refused() -> None:
    W = torch.ones(3, 4)
    with pytest.raises(InputError, match=r"second: expected \(4, 4\) or \(4,\)"):
        weighted_factors(W, torch.eye(3))
    with pytest.raises(InputError, match="gradient: expected"):
        weighted_factors(W, gradient=torch.ones(4))
    with pytest.raises(InputError, match="weight: expected a real 2-D tensor"):
        weighted_factors(torch.ones(3))
    with pytest.raises(InputError, match="entries"):
        weighted_factors(torch.ones(0, 3))
