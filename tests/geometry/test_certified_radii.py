"""Randomised and dual smoothing: bounds, known radii, the formula that over-claims, abstention, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import ndtri
from scipy.stats import binom
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import certified_radius, checkerboard, dual_certified_radius
from eckart.geometry.dual_smoothing import dual_radius
from eckart.geometry.smoothing import lower_bound


@pytest.mark.parametrize(("k", "n"), [(1, 10), (7, 10), (93, 100), (1000, 1000)])
def test_clopper_pearson_inverts_the_binomial_tail(k: int, n: int) -> None:
    p = lower_bound(k, n, 0.01)
    assert binom.sf(k - 1, n, p) == pytest.approx(0.01)  # P(at least k successes) at the bound is α


def test_unanimous_votes_have_the_closed_form() -> None:
    assert lower_bound(50, 50, 0.001) == pytest.approx(0.001 ** (1 / 50))
    assert lower_bound(0, 50, 0.001) == 0
    found = certified_radius(lambda z: torch.ones(len(z), dtype=torch.int64), torch.zeros(3), sigma=0.5, samples=1000)
    assert float(found) == pytest.approx(0.5 * float(ndtri(0.001 ** (1 / 1000))))
    assert found.details["class"] == 1


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.5])
def test_a_half_space_is_certified_almost_to_its_boundary(distance: float) -> None:
    normal = torch.nn.functional.normalize(torch.ones(2, 6, dtype=torch.float64), dim=None)  # any input shape
    x = distance * normal
    found = certified_radius(lambda z: ((z * normal).sum((1, 2)) > 0).long(), x, sigma=1.0, samples=20_000)
    assert 0.9 * distance - 0.03 < float(found) <= distance
    assert found.at_least


def test_scores_and_classes_are_the_same_vote() -> None:
    x = torch.tensor([0.3, -0.2])
    by_class = certified_radius(lambda z: (z[:, 0] > 0).long(), x, sigma=0.5, samples=2000, batch=300)
    by_score = certified_radius(lambda z: torch.stack([-z[:, 0], z[:, 0]], 1), x, sigma=0.5, samples=2000, batch=300)
    assert by_class == by_score


@pytest.mark.parametrize("distances", [(0.6, 0.6), (0.9, 0.2), (1.0, -0.3)])
def test_the_dual_radius_is_sound_and_tight(distances: tuple[float, float]) -> None:
    """Half-spaces on both halves: the votes change sides where d_l + d_r = 0, at distance (d_l + d_r)/√2."""
    x = torch.tensor(distances, dtype=torch.float64)
    true = sum(distances) / math.sqrt(2)
    found = dual_certified_radius(half_space, half_space, x, sigma=0.5, samples=50_000)
    assert 0.85 * true < float(found) <= true


def half_space(z: Tensor) -> Tensor:
    return (z.sum(1) > 0).long()


def smoothed_sum(x: Tensor, sigma: float) -> float:
    """P(f_l = 1) + P(f_r = 1) of the half-spaces, exactly."""
    return float(torch.special.ndtr(x / sigma).sum())


@pytest.mark.parametrize("distances", [(0.9, 0.2), (1.0, 0.05), (1.0, -0.3)])
def test_the_published_cifar_formula_claims_too_much(distances: tuple[float, float]) -> None:
    """√(r_l² + r_r²), even from exact probabilities: a shift inside of its ball changes the class of the vote."""
    sigma = 0.5
    x = torch.tensor(distances, dtype=torch.float64)
    p = torch.special.ndtr(x / sigma).tolist()
    published = math.hypot(*(max(0.0, sigma * float(ndtri(q))) for q in p))
    ours = dual_radius(p[0], p[1], sigma)
    assert smoothed_sum(x, sigma) > 1  # class 1
    direction = -torch.ones(2, dtype=torch.float64) / math.sqrt(2)
    assert smoothed_sum(x + 0.999 * published * direction, sigma) < 1  # and class 0 inside of the published ball
    assert smoothed_sum(x + 0.999 * ours * direction, sigma) > 1
    assert smoothed_sum(x + 1.001 * ours * direction, sigma) < 1  # ours is exact here
    clamped = sum(max(0.0, sigma * float(ndtri(q))) for q in p) / math.sqrt(2)  # the authors' code for ImageNet
    assert clamped >= ours - 1e-12
    if min(distances) < 0:
        assert smoothed_sum(x + 0.999 * clamped * direction, sigma) < 1


def test_no_shift_within_the_dual_radius_changes_the_vote() -> None:
    x, sigma = torch.tensor([0.7, 0.25], dtype=torch.float64), 0.4
    p = torch.special.ndtr(x / sigma).tolist()
    R = dual_radius(p[0], p[1], sigma)
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    shifts = 0.9999 * R * torch.stack([angles.cos(), angles.sin()], 1)
    assert all(smoothed_sum(x + shift, sigma) > 1 for shift in shifts)


def test_each_bound_is_at_half_of_alpha() -> None:
    x = torch.full((2,), 100.0)
    found = dual_certified_radius(half_space, half_space, x, sigma=1.0, samples=1000, alpha=0.01)
    assert found.details["p_left"] == found.details["p_right"] == pytest.approx(0.005 ** (1 / 1000))


def test_each_classifier_sees_its_half_alone() -> None:
    mask = checkerboard(torch.Size([3, 4, 4]))
    assert mask.shape == (3, 4, 4)
    assert int(mask.sum()) == 24
    assert bool((mask[:, :, 1:] ^ mask[:, :, :-1]).all())

    def seen(kept: Tensor):  # type: ignore[no-untyped-def]
        def classify(z: Tensor) -> Tensor:
            assert bool((z[:, ~kept] == 0).all())
            assert bool((z[:, kept] != 0).all())
            return torch.zeros(len(z), dtype=torch.int64)

        return classify

    found = dual_certified_radius(seen(mask), seen(~mask), torch.ones(3, 4, 4), sigma=0.1, samples=50)
    assert found.value is not None


def test_uncertain_votes_abstain() -> None:
    for found in (
        certified_radius(half_space, torch.zeros(2), sigma=1.0, samples=500),
        dual_certified_radius(half_space, half_space, torch.tensor([0.5, -0.5]), sigma=1.0, samples=500),
        dual_certified_radius(lambda z: torch.zeros(len(z)).long(), half_space, torch.tensor([1.0, 99.0]), sigma=1.0),
    ):
        assert found.value is None
        assert "abstain" in found.notes[0]


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"(?s)sigma.*alpha.*samples"):
        certified_radius(half_space, torch.zeros(2), sigma=0.0, alpha=1.0, samples=0)
    with pytest.raises(InputError, match="floating-point"):
        certified_radius(half_space, torch.zeros(2, dtype=torch.int64), sigma=1.0)
    with pytest.raises(NotFiniteError):
        certified_radius(half_space, torch.tensor([torch.nan]), sigma=1.0)
    with pytest.raises(InputError, match="classes"):
        certified_radius(lambda z: z.sum(1), torch.zeros(2), sigma=1.0)
    with pytest.raises(InputError, match=r"\(100,\) classes"):
        certified_radius(lambda z: torch.zeros(3), torch.zeros(2), sigma=1.0)
    with pytest.raises(InputError, match="NaN among the scores"):
        certified_radius(lambda z: z * torch.nan, torch.zeros(2), sigma=1.0)
    with pytest.raises(InputError, match="mask"):
        dual_certified_radius(half_space, half_space, torch.zeros(2), sigma=1.0, mask=torch.tensor([True, True]))
