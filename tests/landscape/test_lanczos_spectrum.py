"""Lanczos and quadrature against eigenvalues that are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, NotFiniteError
from eckart.landscape import (
    Operator,
    gauss_newton_spectrum,
    hessian_spectrum,
    lanczos,
    matrix_operator,
    spectrum,
)
from eckart.landscape.probes import interval, probe_vectors

FIVE = torch.tensor([-1.0, 0.25, 0.5, 2.0, 7.0], dtype=torch.float64)


def rotated(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    n = eigenvalues.numel()
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, _ = torch.linalg.qr(noise)
    A = Q @ torch.diag(eigenvalues) @ Q.T
    return (A + A.T) / 2


def test_five_points_forty_times_are_exact_after_five_steps() -> None:
    """The notes' check: the Krylov space of five distinct eigenvalues has five dimensions."""
    operator = matrix_operator(rotated(FIVE.repeat(40)))
    (v,) = probe_vectors(operator, 1, 0)
    found = lanczos(operator, v, 5)
    torch.testing.assert_close(found.nodes, FIVE, rtol=0, atol=1e-12)
    assert float(found.residuals.max()) < 1e-11
    exact = lanczos(matrix_operator(torch.diag(FIVE.repeat(40))), v, 100)
    assert exact.exhausted
    torch.testing.assert_close(exact.nodes, FIVE, rtol=0, atol=1e-12)
    # Rotated, the forty copies coincide only to rounding; whatever more steps find lies there too.
    more = lanczos(operator, v, 60)
    assert float((more.nodes[:, None] - FIVE).abs().min(1).values.max()) < 1e-11
    # Its weights are the shares of v in the five eigenspaces.
    values, vectors = torch.linalg.eigh(operator.dense())
    shares = (vectors.T @ v).square() / 200
    for value, weight in zip(FIVE, found.weights, strict=True):
        assert float(shares[(values - value).abs() < 1e-6].sum()) == pytest.approx(float(weight), abs=1e-10)


def test_without_breakdown_all_eigenvalues_come_out() -> None:
    """n steps on n distinct eigenvalues; a single pass of orthogonalisation would leave ghosts."""
    values = torch.logspace(-6, 3, 60, dtype=torch.float64)
    operator = matrix_operator(rotated(values))
    (v,) = probe_vectors(operator, 1, 3)
    found = lanczos(operator, v, 60)
    torch.testing.assert_close(found.nodes, torch.linalg.eigvalsh(operator.dense()), rtol=0, atol=1e-11)


def test_quadrature_is_exact_for_polynomials_up_to_its_degree() -> None:
    A = rotated(torch.linspace(-1, 2, 50, dtype=torch.float64))
    operator = matrix_operator(A)
    (v,) = probe_vectors(operator, 1, 1, "gaussian")
    found = lanczos(operator, v, 4)
    for degree in range(8):
        exact = float(v @ torch.linalg.matrix_power(A, degree) @ v)
        assert found.square_norm * float(found.weights @ found.nodes**degree) == pytest.approx(exact, rel=1e-10)
    assert found.quadratic == pytest.approx(float(v @ A @ v), rel=1e-12)
    beyond = float(v @ torch.linalg.matrix_power(A, 8) @ v)
    assert found.square_norm * float(found.weights @ found.nodes**8) != pytest.approx(beyond, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_residuals_bound_the_distance_to_an_eigenvalue(seed: int) -> None:
    values = torch.randn(120, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    operator = matrix_operator(rotated(values, seed))
    (v,) = probe_vectors(operator, 1, seed)
    found = lanczos(operator, v, 25)
    for node, residual in zip(found.nodes, found.residuals, strict=True):
        assert float((values - node).abs().min()) <= float(residual) + 1e-12
    assert float(found.nodes[-1]) <= float(values.max()) + 1e-12
    assert float(found.nodes[0]) >= float(values.min()) - 1e-12


def test_trace_interval_covers_and_its_width_is_that_of_theory() -> None:
    values = torch.linspace(-2, 5, 80, dtype=torch.float64)
    A = rotated(values)
    operator = matrix_operator(A)
    covered, widths = 0, []
    for seed in range(100):
        found = spectrum(operator, steps=2, probes=6, seed=seed).figures()["trace"]
        assert found.n == 6
        assert found.uncertainty is not None
        covered += abs(float(found) - float(values.sum())) <= found.uncertainty
        widths.append((found.uncertainty / 2.5706 * math.sqrt(6)) ** 2)  # t of 5 degrees at 97.5 %
    assert covered >= 87  # 95 expected, 2 % quantile of the binomial is 90
    off_diagonal = 2 * float((A - torch.diag(A.diagonal())).square().sum())  # variance of Rademacher probes
    assert sum(widths) / 100 == pytest.approx(off_diagonal, rel=0.25)


def test_figures_of_a_known_spectrum() -> None:
    operator = matrix_operator(rotated(FIVE.repeat(40)))
    found = spectrum(operator, steps=20, probes=20)
    figures = found.figures()
    assert figures["top_eigenvalue"].value == pytest.approx(7, abs=1e-11)
    assert figures["bottom_eigenvalue"].value == pytest.approx(-1, abs=1e-11)
    assert (figures["top_eigenvalue"].uncertainty or 0) < 1e-10
    assert figures["top_eigenvalue"].name == "matrix_top_eigenvalue"
    share = figures["negative_share"]
    assert abs(float(share) - 0.2) <= 1.5 * (share.uncertainty or 0)
    count = figures["effective_count"]
    exact = float(FIVE.abs().sum() ** 2 / FIVE.square().sum()) * 40
    assert float(count) == pytest.approx(exact, rel=0.1)
    trace = found.moment(lambda eigenvalues: eigenvalues)
    assert float(trace) == pytest.approx(float(figures["trace"]))
    json.dumps({name: finding.to_json() for name, finding in figures.items()})
    assert "matrix_trace" in str(found)
    assert "matrix_trace" in found._repr_html_()


def test_cumulative_and_density() -> None:
    found = spectrum(matrix_operator(rotated(FIVE.repeat(40))), steps=20, probes=20)
    points = torch.tensor([-2.0, -0.5, 0.4, 1.0, 5.0, 8.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.cumulative(points), expected, rtol=0, atol=0.05)
    grid = torch.linspace(-3, 9, 2401, dtype=torch.float64)
    assert float(found.density(grid, 0.05).sum()) * 0.005 == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match="width"):
        found.density(grid, 0.0)


def test_zero_tiny_and_one_sided_operators() -> None:
    zero = spectrum(matrix_operator(torch.zeros(7, 7, dtype=torch.float64)), probes=2).figures()
    assert zero["trace"].value == zero["top_eigenvalue"].value == 0
    assert zero["effective_count"].value is None
    one = spectrum(matrix_operator(torch.tensor([[3.0]])), probes=2).figures()
    assert one["top_eigenvalue"].value == pytest.approx(3)
    assert one["negative_share"].value == 0
    alone = spectrum(matrix_operator(rotated(FIVE)), probes=1).figures()["trace"]
    assert alone.uncertainty is None
    assert alone.notes == ("one probe: no interval",)


def test_float32_keeps_its_digits() -> None:
    # Rounding of 200 × 200 products in float32: about √200 · 6e-8 of the largest eigenvalue.
    operator = matrix_operator(rotated(FIVE.repeat(40)).float())
    figures = spectrum(operator, steps=30, probes=2).figures()
    assert figures["top_eigenvalue"].value == pytest.approx(7, rel=1e-5)
    assert (figures["top_eigenvalue"].uncertainty or 0) > 1e-7


def model_and_data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    return model, torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,))


def test_model_spectra_agree_with_the_matrices() -> None:
    model, x, y = model_and_data()
    hessian = hessian_spectrum(model, lambda m: cross_entropy(m(x), y), steps=114, probes=3)
    parts = [lambda m, i=i: cross_entropy(m(x[10 * i : 10 * i + 10]), y[10 * i : 10 * i + 10]) for i in range(3)]
    split = hessian_spectrum(model, parts, steps=114, probes=3)
    assert hessian.size == 114
    assert float(hessian.figures()["top_eigenvalue"]) == pytest.approx(float(split.figures()["top_eigenvalue"]))
    gauss = gauss_newton_spectrum(model, lambda m: m(x), lambda z: cross_entropy(z, y), steps=114, probes=3)
    assert gauss.figures()["negative_share"].value == pytest.approx(0, abs=1e-9)
    assert gauss.figures()["trace"].name == "gauss_newton_trace"


def test_same_seed_same_figures() -> None:
    model, x, y = model_and_data()
    one, two = (hessian_spectrum(model, lambda m: cross_entropy(m(x), y), steps=5, probes=2) for _ in range(2))
    assert one.figures() == two.figures()


def test_refuses() -> None:
    operator = matrix_operator(torch.eye(4))
    with pytest.raises(InputError, match=r"2 problems"):
        spectrum(operator, steps=0, probes=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="start"):
        lanczos(operator, torch.ones(3), 2)
    with pytest.raises(InputError, match="not zero"):
        lanczos(operator, torch.zeros(4), 2)
    with pytest.raises(InputError, match="probes are"):
        spectrum(operator, kind="uniform")  # type: ignore[arg-type]
    broken = Operator(size=4, matvec=lambda v: v * float("nan"), dtype=torch.float32)
    with pytest.raises(NotFiniteError, match="product 1"):
        spectrum(broken)


def test_interval_is_students() -> None:
    found = interval("x", [1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.uncertainty == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
