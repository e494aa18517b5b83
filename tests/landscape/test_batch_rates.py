"""Curvature and learning rate against batch size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eckart.errors import InputError
from eckart.landscape import (
    batch_eigenvalue,
    hessian_noise,
    learning_rate_by_batch,
    scaled_learning_rate,
)


@pytest.mark.parametrize("law", ["semicircle", "covariance"])
def test_laws_are_continuous_fall_with_the_batch_and_end_at_the_eigenvalue(law) -> None:
    batches = [2.0 ** (k / 4) for k in range(80)]
    values = [batch_eigenvalue(2.0, 0.1, 2000, b, law=law) for b in batches]
    assert values == sorted(values, reverse=True)
    assert max(a / b for a, b in itertools.pairwise(values)) < 1.25
    limit = 2.0 if law == "semicircle" else 2.01
    assert batch_eigenvalue(2.0, 0.1, 2000, 1e12, law=law) == pytest.approx(limit, rel=1e-6)
    edge = 5.0 if law == "semicircle" else 2000 * (0.1**2 / 2) ** 2  # where λ = s√(D/b), or λ = s²√(D/b)
    assert batch_eigenvalue(2.0, 0.1, 2000, edge * 1.0001, law=law) == pytest.approx(
        batch_eigenvalue(2.0, 0.1, 2000, edge * 0.9999, law=law), rel=1e-3
    )


@pytest.mark.parametrize("batch", [1, 3, 10, 30])
def test_semicircle_on_planted_noise(batch: int) -> None:
    """Threshold at b* = 600 · 0.15² / 1.5² = 6: two sizes below, two above; the edge scatters by n^(−2/3)."""
    n, generator = 600, torch.Generator().manual_seed(batch)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    direction = torch.randn(n, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    E = (A + A.T) / math.sqrt(2) * 0.15 / math.sqrt(batch) + 1.5 * direction.outer(direction)
    seen = float(torch.linalg.eigvalsh(E)[-1])
    assert seen == pytest.approx(batch_eigenvalue(1.5, 0.15, n, batch), rel=0.04)


@pytest.mark.parametrize("batch", [20, 100, 1000])
def test_covariance_on_planted_samples(batch: int) -> None:
    """Gradients of unit noise with one direction of variance 1 + 4: threshold at γ = 16, b = 25 for 400 coordinates."""
    n, generator = 400, torch.Generator().manual_seed(batch)
    seen = []
    for _ in range(3):
        G = torch.randn(batch, n, generator=generator, dtype=torch.float64)
        G[:, 0] *= math.sqrt(5)
        seen.append(float(torch.linalg.eigvalsh(G @ G.T if batch < n else G.T @ G)[-1]) / batch)
    assert sum(seen) / 3 == pytest.approx(batch_eigenvalue(4.0, 1.0, n, batch, law="covariance"), rel=0.08)


def test_exponents_of_the_docstring() -> None:
    def exponent(b: float, law: str) -> float:
        low, high = (batch_eigenvalue(1.0, 0.01, 10**6, b * f, law=law) for f in (0.999, 1.001))  # type: ignore[arg-type]
        return math.log(low / high) / math.log(1.001 / 0.999)

    assert exponent(3.0, "semicircle") == pytest.approx(0.5)  # below b* = 100
    assert exponent(300.0, "semicircle") == pytest.approx(100 / 400, rel=1e-3)
    assert exponent(1.0, "covariance") == pytest.approx(1, abs=0.02)


def test_samples_without_replacement() -> None:
    assert batch_eigenvalue(2.0, 0.1, 1000, 50, samples=50) == pytest.approx(2.0)
    seen = batch_eigenvalue(2.0, 0.1, 1000, 25, samples=50)
    assert seen == pytest.approx(batch_eigenvalue(2.0, 0.1, 1000, 50))  # 1/25 − 1/50 = 1/50


def test_rules() -> None:
    assert scaled_learning_rate(0.1, 32, 128) == pytest.approx(0.4)
    assert scaled_learning_rate(0.1, 128, 32, "adam") == pytest.approx(0.05)


def regression(n: int, d: int = 5) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(d, 1, bias=False).double(), torch.randn(n, d, dtype=torch.float64)


def half_square(x: torch.Tensor):
    return lambda m: 0.5 * mse_loss(m(x), torch.zeros(x.shape[0], 1, dtype=x.dtype))


def test_noise_of_a_quadratic_is_the_deviation_of_its_entries() -> None:
    """The Hessian of a sample is x xᵀ: entries of Gaussian x have variance 1, diagonal ones 2."""
    model, x = regression(4000)
    found = hessian_noise(model, [half_square(part) for part in x.split(10)], batch_size=10)
    exact = math.sqrt((5 * 2 + 20 * 1) / 25)
    assert abs(float(found) - exact) <= 1.5 * (found.uncertainty or 0)
    assert found.n == 200
    assert (found.uncertainty or 1) < 0.1


def test_critical_batch_is_measured_and_predicts_other_sizes() -> None:
    model, x = regression(20_000, d=30)
    found = learning_rate_by_batch(
        model,
        half_square(x),
        [half_square(part) for part in x[:3000].split(100)],
        batch_size=100,
        batch_sizes=[50, 100, 400],
    )
    top = float(torch.linalg.eigvalsh(x.T @ x / 20_000)[-1])
    assert found.details["eigenvalue"] == pytest.approx(top)
    curve = {row["batch_size"]: row for row in found.details["curve"]}
    tops = [float(torch.linalg.eigvalsh(part.T @ part / 100)[-1]) for part in x[:3000].split(100)]
    assert curve[100]["eigenvalue"] == pytest.approx(sum(tops) / 30)
    assert curve[100]["sgd"] == pytest.approx(2 / curve[100]["eigenvalue"])
    assert curve[400]["adam"] == 1
    assert curve[50]["sgd"] < curve[100]["sgd"] < curve[400]["sgd"]
    assert found.uncertainty is not None
    assert float(found) > found.uncertainty > 0


def test_identical_batches_have_no_noise() -> None:
    model, x = regression(50)
    found = learning_rate_by_batch(model, half_square(x), [half_square(x)] * 4, batch_size=50, batch_sizes=[10])
    assert float(found) == pytest.approx(0, abs=1e-9)
    assert found.details["noise"] == 0


def test_refuses() -> None:
    model, x = regression(20)
    for wrong in ({"eigenvalue": -1.0}, {"noise": -1.0}, {"batch_size": 0}, {"law": "wigner"}, {"samples": 3}):
        settings = {"eigenvalue": 1.0, "noise": 0.1, "parameters": 10, "batch_size": 4} | wrong
        with pytest.raises(InputError, match=r"batch_eigenvalue|unknown law"):
            batch_eigenvalue(**settings)
    with pytest.raises(InputError, match="covariance"):
        batch_eigenvalue(1.0, 0.1, 10, 4, samples=20, law="covariance")
    with pytest.raises(InputError, match="unknown optimizer"):
        scaled_learning_rate(0.1, 1, 2, "lion")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="to_batch"):
        scaled_learning_rate(0.1, 1, 0)
    with pytest.raises(InputError, match="two batches"):
        hessian_noise(model, [half_square(x)], batch_size=20)
    with pytest.raises(InputError, match="two batches"):
        learning_rate_by_batch(model, half_square(x), [half_square(x)], batch_size=20, batch_sizes=[1])
    with pytest.raises(InputError, match="larger than the 20 samples"):
        learning_rate_by_batch(model, half_square(x), [half_square(x)] * 2, batch_size=10, batch_sizes=[40], samples=20)
    with pytest.raises(InputError, match="has to be positive"):
        learning_rate_by_batch(
            model, lambda m: -half_square(x)(m), [half_square(x)] * 2, batch_size=10, batch_sizes=[4]
        )
