"""Hutch++ and Hutchinson's estimate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eckart.errors import InputError, NotFiniteError
from eckart.landscape import Operator, hessian_trace, matrix_operator, trace


def decaying(n: int = 100) -> torch.Tensor:
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    A = Q @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** -1.5) @ Q.T
    return (A + A.T) / 2


def counted(A: torch.Tensor) -> tuple[Operator, list[int]]:
    calls = [0]

    def matvec(v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return A @ v

    return Operator(size=A.shape[0], matvec=matvec), calls


@pytest.mark.parametrize("products", [6, 7, 30, 60])
def test_spends_no_more_products_than_told(products: int) -> None:
    operator, calls = counted(decaying())
    trace(operator, products=products)
    assert calls[0] == 3 * (products // 3)
    operator, calls = counted(decaying())
    trace(operator, products=products, method="hutchinson")
    assert calls[0] == products


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_is_unbiased_and_its_interval_covers(method) -> None:
    A = decaying() - 0.02 * torch.eye(100, dtype=torch.float64)  # indefinite, which unbiasedness does not mind
    found = [trace(matrix_operator(A), products=18, method=method, seed=seed) for seed in range(150)]
    values = torch.tensor([float(f) for f in found])
    assert abs(float(values.mean()) - float(A.trace())) < 3.5 * float(values.std()) / 150**0.5
    covered = sum(abs(float(f) - float(A.trace())) <= (f.uncertainty or 0) for f in found)
    assert covered >= 130  # 142 expected


def test_low_rank_is_exact() -> None:
    A = torch.zeros(40, 40, dtype=torch.float64)
    A[:4, :4] = decaying(4)
    found = trace(matrix_operator(A), products=15)
    assert found.value == pytest.approx(float(A.trace()), abs=1e-12)
    assert found.details["caught_share"] == pytest.approx(1)


def test_of_a_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), torch.randn(20, 5, dtype=torch.float64)
    exact = 2 * float(x.square().sum(1).mean() + 1)  # the Hessian of a mean square is 2 E[(x, 1)(x, 1)ᵀ]
    found = hessian_trace(model, lambda m: mse_loss(m(x)[:, 0], x[:, 0]), products=60)
    assert found.value == pytest.approx(exact)
    half = hessian_trace(model.bfloat16(), lambda m: mse_loss(m(x.float())[:, 0], x[:, 0].float()))
    assert any("float32 copy" in note for note in half.notes)


def test_refuses() -> None:
    operator = matrix_operator(torch.eye(4))
    with pytest.raises(InputError, match="hutch"):
        trace(operator, method="hutch")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 6"):
        trace(operator, products=5)
    broken = Operator(size=4, matvec=lambda v: v * float("nan"))
    with pytest.raises(NotFiniteError):
        trace(broken, products=6)
