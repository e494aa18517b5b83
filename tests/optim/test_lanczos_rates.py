"""Rates from curvature, against eigenvalues, the theory of heavy-ball descent, and the rules for batch sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.landscape import matrix_operator, scaled_learning_rate
from eckart.optim import batch_scaled_rate, lanczos_rates, operator_rates
from eckart.records import Finding


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """Linear regression: H = 2 XᵀX/n."""
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(gaussian(1, 6, seed=seed))
    X = gaussian(30, 6, seed=seed + 1) * torch.linspace(1, 3, 6, dtype=torch.float64)
    return model, X, gaussian(30, seed=seed + 2)


def test_rates_of_a_quadratic_are_polyaks() -> None:
    model, X, y = squares()
    rates = lanczos_rates(model, [lambda m: (m(X)[:, 0] - y).square().mean()])
    values = torch.linalg.eigvalsh(2 * X.T @ X / 30)
    low, high = values[0].sqrt(), values[-1].sqrt()
    assert rates.learning_rate == pytest.approx(float(4 / (low + high) ** 2))
    assert rates.momentum == pytest.approx(float((high - low) / (high + low)) ** 2)
    assert rates.smallest == pytest.approx(float(values[0]))
    assert not rates.floored
    assert float(rates.largest) == pytest.approx(float(values[-1]))
    assert model.weight.grad is None


def test_descent_with_them_falls_as_predicted_and_faster_than_without_momentum() -> None:
    H = torch.diag(torch.linspace(0.5, 50.0, 20, dtype=torch.float64))
    rates = operator_rates([matrix_operator(H)])
    w = nn.Parameter(gaussian(20))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.0)
    rates.put(optimizer)
    start = w.detach().norm()
    for _ in range(100):
        w.grad = H @ w.detach()
        optimizer.step()
    reached = float(w.detach().norm() / start)
    assert math.log(reached) / 100 == pytest.approx(math.log(rates.rate), rel=0.2)
    without = ((50 - 0.5) / (50 + 0.5)) ** 100  # the best constant rate, 2/(λ₁ + λₙ)
    assert reached < 0.01 * without


def test_several_batches_give_the_mean_of_their_tops_with_an_interval() -> None:
    tops = (4.0, 6.0, 8.0)
    rates = operator_rates([matrix_operator(torch.diag(torch.tensor([t, 1.0])).double()) for t in tops])
    assert float(rates.largest) == pytest.approx(6.0)
    assert rates.largest.n == 3
    assert rates.largest.uncertainty > 0
    assert rates.smallest == pytest.approx(1.0)


def test_negative_and_tiny_curvature_meet_the_floor() -> None:
    for low in (-2.0, 0.0, 1e-9):
        H = torch.diag(torch.tensor([10.0, low], dtype=torch.float64))
        rates = operator_rates([matrix_operator(H)], floor=0.01)
        assert rates.smallest == pytest.approx(0.1 if low == 1e-9 else 10.0)
        assert rates.floored == (low == 1e-9)
    with pytest.raises(InputError, match="has to be positive"):
        operator_rates([matrix_operator(-torch.eye(2, dtype=torch.float64))])


def test_put_sets_all_groups_or_none() -> None:
    rates = operator_rates([matrix_operator(torch.diag(torch.tensor([4.0, 1.0])).double())])
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": torch.tensor(3.0)}], lr=1.0)
    rates.put(optimizer, scale=0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([rates.learning_rate / 2] * 2)
    assert isinstance(optimizer.param_groups[1]["lr"], Tensor)
    assert {group["momentum"] for group in optimizer.param_groups} == {rates.momentum}
    mixed = torch.optim.SGD([{"params": [a]}, {"params": [b], "nesterov": True, "momentum": 0.5}], lr=1.0, momentum=0.1)
    with pytest.raises(InputError, match="group 1: nesterov"):
        rates.put(mixed)
    assert mixed.param_groups[0]["lr"] == 1.0
    with pytest.raises(InputError, match="no momentum"):
        rates.put(torch.optim.Adam([a]))
    with pytest.raises(InputError, match="scale"):
        rates.put(optimizer, scale=0.0)


def test_batch_scaling_joins_the_rules_of_small_and_large_batches() -> None:
    for optimizer in ("sgd", "adam"):
        small = batch_scaled_rate(0.1, 2, 8, 1e9, optimizer)
        assert small == pytest.approx(scaled_learning_rate(0.1, 2, 8, optimizer))
        assert batch_scaled_rate(0.1, 1e9, 1e12, 10.0, optimizer) == pytest.approx(0.1)
        there = batch_scaled_rate(0.1, 16, 256, 50.0, optimizer)
        assert batch_scaled_rate(there, 256, 16, 50.0, optimizer) == pytest.approx(0.1)
    assert batch_scaled_rate(0.1, 10, 30, Finding(name="b", value=30.0)) == pytest.approx(0.1 * 4 / 2)


def test_bad_input_is_named_at_once() -> None:
    model, X, _ = squares()
    with pytest.raises(InputError, match="at least one batch"):
        lanczos_rates(model, [])
    with pytest.raises(InputError, match="at least one batch"):
        lanczos_rates(model, lambda m: m(X).sum())
    with pytest.raises(InputError) as caught:
        operator_rates([], floor=0.0)
    assert "operator" in str(caught.value)
    assert "floor" in str(caught.value)
    with pytest.raises(InputError) as caught:
        batch_scaled_rate(0.0, -1, math.inf, Finding(name="b", value=None), "lion")
    for word in ("learning_rate", "from_batch", "to_batch", "critical", "optimizer"):
        assert word in str(caught.value)
