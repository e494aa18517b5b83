"""Checks of generated data and of scores: nulls, closed forms, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import gaussian_universality, norm_concentration, normal_bundle, score_gauge
from eckart.geometry.manifolds import embed, gaussian
from eckart.geometry.normal_bundle import smoothed_score


def test_gaussians_are_universal() -> None:
    """The null: over 20 samples the interval holds 0 in at least 17, and the mean difference is small."""
    differences, inside = [], 0
    for seed in range(20):
        labels = torch.arange(400) % 2
        finding = gaussian_universality(gaussian(400, 10, 10, seed=seed) + 0.4 * labels[:, None], labels)
        differences.append(float(finding))
        inside += abs(float(finding)) <= float(finding.uncertainty or 0.0)
    assert inside >= 17
    assert abs(sum(differences) / 20) < 0.015


def test_two_lumps_in_a_class_are_seen() -> None:
    """Class 0 is at −1 and, a fifth of it, at 4, class 1 at 0.3: one threshold does what it cannot do to Gaussians."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    labels = torch.arange(n) % 2
    lumps = torch.where(torch.rand(n, generator=generator) < 0.2, 4.0, -1.0)
    X = torch.where(labels == 0, lumps, 0.3 * torch.ones(n)).double()[:, None]
    X = X + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    finding = gaussian_universality(X, labels)
    assert abs(float(finding)) > 3 * float(finding.uncertainty or 0.0)
    assert finding.details["error"] - finding.details["gaussian_error"] == pytest.approx(float(finding))


def test_few_rows_are_checked_on_few_directions() -> None:
    labels = torch.arange(100) % 2
    finding = gaussian_universality(gaussian(100, 30, 30, seed=0), labels)
    assert finding.details["features"] == 5
    assert "5 principal directions" in finding.notes[0]
    collinear = gaussian(400, 3, 3, seed=0)
    finding = gaussian_universality(torch.cat([collinear, collinear], 1), torch.arange(400) % 2)
    assert finding.value is not None


def test_universality_of_bad_input() -> None:
    X = torch.randn(40, 2)
    for y in (torch.zeros(40, dtype=torch.long), torch.arange(40) // 36):
        assert gaussian_universality(X, y).value is None
    assert gaussian_universality(torch.ones(40, 2), torch.arange(40) % 2).notes == ("all rows are equal",)
    with pytest.raises(InputError, match="3 problems"):
        gaussian_universality(X, torch.randn(40), folds=1, draws=0)


@pytest.mark.parametrize("D", [1, 2, 30, 400])
def test_norms_of_gaussians_spread_as_stated(D: int) -> None:
    spread, tail = norm_concentration(gaussian(2000, D, D, seed=0) * torch.linspace(1, 3, D, dtype=torch.float64))
    assert float(spread) == pytest.approx(1.0, abs=2 * float(spread.uncertainty or 0.0))
    assert float(tail) == pytest.approx({1: 1.11, 2: 1.08}.get(D, 1.0), abs=2 * float(tail.uncertainty or 0.0))


def test_signs_have_perfect_norms_and_a_common_scale_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (1000, 50), generator=generator) - 1
    assert float(norm_concentration(signs)[0]) < 0.5
    scale = -torch.rand(1000, 1, generator=generator, dtype=torch.float64).log()
    spread, tail = norm_concentration(gaussian(1000, 50, 50, seed=0) * scale)
    assert float(spread) > 3
    assert float(tail) == pytest.approx(1.46, abs=3 * float(tail.uncertainty or 0.0))


def test_norms_of_bad_input() -> None:
    for X in (torch.ones(300, 2), torch.randn(50, 2)):
        assert all(finding.value is None and finding.notes for finding in norm_concentration(X))
    on_corners = torch.tensor([[1.0], [-1.0]]).repeat(200, 1)
    assert norm_concentration(on_corners)[1].value is None
    with pytest.raises(NotFiniteError):
        norm_concentration(torch.full((300, 2), torch.inf))


def flat_score(d: int, D: int, sigma: float):  # type: ignore[no-untyped-def]
    """Of N(0, I_d) in the first d of D coordinates, turned, with noise of std sigma."""
    variances = torch.full((D,), sigma**2, dtype=torch.float64)
    variances[:d] += 1
    basis = embed(torch.eye(D, dtype=torch.float64), D, seed=0)
    precision = basis.T @ torch.diag(1 / variances) @ basis
    return lambda x: -x @ precision.to(x)


@pytest.mark.parametrize("d", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normals_of_a_flat_manifold(d: int, dtype: torch.dtype) -> None:
    finding = normal_bundle(flat_score(d, 8, 0.01), torch.zeros(3, 8, dtype=dtype), sigma=0.01, batch=7)
    assert finding.value == d
    assert finding.details["dimensions"] == [d, d, d]
    assert finding.uncertainty == 0.0
    assert not finding.notes


def test_no_manifold_no_gap() -> None:
    finding = normal_bundle(lambda x: -x, torch.zeros(2, 20), sigma=1.0)
    assert "no clear gap at 2 of 2 points" in finding.notes[0]
    assert normal_bundle(lambda x: -x, torch.zeros(1, 20), sigma=1.0).uncertainty is None


def test_normals_change_from_point_to_point() -> None:
    """A line and a plane that stand apart."""
    line = torch.cat([torch.linspace(-1, 1, 400)[:, None], torch.zeros(400, 3)], 1).double()
    plane = torch.cat(
        [torch.zeros(2500, 1), torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 50)]), torch.ones(2500, 1)], 1
    )
    data = torch.cat([line, 5 + plane.double()])
    points = torch.stack([line[200], 5 + plane.double()[1275]])
    assert normal_bundle(smoothed_score(data, 0.1), points, sigma=0.1).details["dimensions"] == [1, 2]


def test_bundle_of_bad_input() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(InputError, match="4 problems"):
        normal_bundle(lambda x: x, torch.zeros(2, 1, dtype=torch.long), sigma=0.0, probes=0)
    with pytest.raises(InputError, match="it gave"):
        normal_bundle(lambda x: x[:, :2], x, sigma=0.1)
    with pytest.raises(NotFiniteError, match="the score gave"):
        normal_bundle(lambda x: x / 0, x, sigma=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gauge_of_a_linear_field_is_its_ratio(dtype: torch.dtype) -> None:
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    true = float((A - A.T).norm() / (A + A.T).norm())
    finding = score_gauge(lambda x: x @ A.T, torch.zeros(50, 6, dtype=dtype), probes=20)
    assert abs(float(finding) - true) < 2 * float(finding.uncertainty or 0.0)
    assert 0 < float(finding.uncertainty or 0.0) < 0.1 * true


def test_gauge_of_a_gradient_is_zero_and_of_a_rotation_unbounded() -> None:
    def energy_gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: (z.sin().prod(1) + z.pow(4).sum(1)).sum())(x)

    assert float(score_gauge(energy_gradient, gaussian(20, 4, 4, seed=0))) < 1e-12
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert score_gauge(lambda x: x @ turn, torch.zeros(2, 2)).notes == ("the Jacobian has no symmetric part",)
    assert score_gauge(lambda x: 0 * x, torch.zeros(2, 2)).notes == ("the Jacobian is zero",)


def test_gauge_of_a_field_that_bends() -> None:
    """Against the Jacobians themselves."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5)).double()
    x = gaussian(40, 5, 5, seed=0)
    J = torch.func.vmap(torch.func.jacrev(net))(x).detach()
    true = math.sqrt(float((J - J.mT).square().sum() / (J + J.mT).square().sum()))
    finding = score_gauge(net, x, probes=64)
    assert abs(float(finding) - true) < 2 * float(finding.uncertainty or 0.0)


def test_gauge_of_bad_input() -> None:
    with pytest.raises(InputError, match="2 problems"):
        score_gauge(lambda x: x, torch.zeros(2, 2, dtype=torch.long), probes=1)
    with pytest.raises(InputError, match="it gave"):
        score_gauge(lambda x: x[:, :1], torch.zeros(2, 2))
    with pytest.raises(NotFiniteError):
        score_gauge(lambda x: x * torch.inf, torch.zeros(2, 2))
