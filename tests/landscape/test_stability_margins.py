"""Stability conditions against the dynamics they are about."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eckart.errors import InputError
from eckart.landscape import matrix_operator, stability, stability_margins


def second_moment_radius(X: torch.Tensor, rate: float, batch: int) -> float:
    """Spectral radius of M ↦ E[(I − ηH_b) M (I − ηH_b)] as a d² × d² matrix: SGD's stability in the mean square."""
    n, d = X.shape
    eye = torch.eye(d, dtype=X.dtype)
    H = X.T @ X / n
    single = sum(torch.kron(x.outer(x), x.outer(x)) for x in X) / n
    square = single / batch + (1 - 1 / batch) * torch.kron(H, H)
    T = torch.kron(eye, eye) - rate * (torch.kron(H, eye) + torch.kron(eye, H)) + rate**2 * square
    return float(torch.linalg.eigvalsh((T + T.T) / 2)[-1])


def rows(n: int, d: int, seed: int, *, equal_norms: bool) -> torch.Tensor:
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X * torch.linspace(0.3, 2, d, dtype=torch.float64)
    return X / X.norm(dim=1, keepdim=True) if equal_norms else X


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_above_the_sgd_limit_the_mean_square_diverges(seed: int, batch: int) -> None:
    """The condition is necessary: just above the stated rate the exact second moment grows for any samples."""
    X = rows(12, 6, seed, equal_norms=False)
    found = stability(matrix_operator(X.T @ X / 12), 0.1, batch_size=batch, steps=6, probes=400)
    limit = found["sgd_max_learning_rate"]
    rate = float(limit) + (limit.uncertainty or 0)
    assert second_moment_radius(X, 1.01 * rate, batch) > 1


@pytest.mark.parametrize("seed", range(4))
def test_with_samples_of_equal_norm_the_trace_is_the_exact_limit(seed: int) -> None:
    X = rows(12, 6, seed, equal_norms=True)
    limit = 2.0  # tr H = 1
    assert second_moment_radius(X, 1.01 * limit, 1) > 1
    assert second_moment_radius(X, 0.99 * limit, 1) < 1
    delta = torch.ones(6, dtype=torch.float64)
    stay, leave = delta, delta
    for i in torch.randint(0, 12, (400,), generator=torch.Generator().manual_seed(seed)):
        stay = stay - 0.9 * limit * X[i] * (X[i] @ stay)
        leave = leave - 1.1 * limit * X[i] * (X[i] @ leave)
    assert float(stay.norm()) < 0.1 * float(delta.norm())
    assert float(leave.norm()) > 10 * float(delta.norm())


def test_gradient_descent_turns_at_two_over_the_largest_eigenvalue() -> None:
    X = rows(40, 6, 0, equal_norms=False)
    H = X.T @ X / 40
    found = stability(matrix_operator(H), 0.01)
    limit = float(found["gd_max_learning_rate"])
    assert limit == pytest.approx(2 / float(torch.linalg.eigvalsh(H)[-1]))
    assert found["gd_margin"].value == pytest.approx(limit / 0.01)
    ends = []
    for share in (0.98, 1.02):
        delta = torch.ones(6, dtype=torch.float64)
        for _ in range(2000):
            delta = delta - share * limit * (H @ delta)
        ends.append(float(delta.norm()))
    assert ends[0] < 1e-6
    assert ends[1] > 1e6


def test_formula_for_batches_and_outputs() -> None:
    H = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    square_over_trace = 30 / 10
    for batch, outputs in ((1, 1), (2, 1), (4, 2), (1000, 1)):
        found = stability(matrix_operator(H), 0.1, batch_size=batch, outputs=outputs)
        kappa = max(10 / (outputs * batch) + (1 - 1 / batch) * square_over_trace, 4)
        assert float(found["sgd_max_learning_rate"]) == pytest.approx(2 / kappa)
        assert float(found["sgd_margin"]) == pytest.approx(2 / kappa / 0.1)


def test_uncertainty_is_carried_and_a_tie_is_said() -> None:
    Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    H = Q @ torch.diag(torch.linspace(0.1, 1, 60, dtype=torch.float64)) @ Q.T
    found = stability(matrix_operator((H + H.T) / 2), 2 / float(H.trace()), probes=4)
    margin = found["sgd_margin"]
    assert margin.uncertainty is not None
    assert abs(float(margin) - 1) <= 2 * margin.uncertainty
    assert any("cannot be told" in note for note in margin.notes) == (abs(float(margin) - 1) <= margin.uncertainty)


def test_saddles_and_maxima_are_said() -> None:
    saddle = stability(matrix_operator(torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64))), 0.1)
    assert any("not a minimum" in note for note in saddle["gd_margin"].notes)
    maximum = stability(matrix_operator(-torch.eye(3, dtype=torch.float64)), 0.1)
    assert maximum["gd_margin"].value is None
    assert maximum["sgd_margin"].value is None
    assert "not positive" in maximum["sgd_margin"].notes[0]


def test_of_a_model_at_its_minimum() -> None:
    torch.manual_seed(0)
    X = torch.randn(30, 4, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    target = model(X).detach()
    found = stability_margins(model, lambda m: 0.5 * mse_loss(m(X), target), 0.1, probes=50)
    H = X.T @ X / 30
    assert float(found["gd_max_learning_rate"]) == pytest.approx(2 / float(torch.linalg.eigvalsh(H)[-1]))
    limit = found["sgd_max_learning_rate"]
    assert abs(float(limit) - 2 / float(H.trace())) <= 1.5 * (limit.uncertainty or 0)


def test_refuses() -> None:
    operator = matrix_operator(torch.eye(2))
    with pytest.raises(InputError, match="3 problems"):
        stability(operator, -1.0, batch_size=0, outputs=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="learning_rate"):
        stability(operator, float("nan"))
