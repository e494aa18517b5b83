"""Label sharpness, diffusion spectral entropy and information: closed forms, invariances, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import label_sharpness, loss_scaling, spectral_entropy, spectral_information, two_nn
from eckart.geometry.manifolds import gaussian
from eckart.records import Finding


def test_sharpness_of_classes_is_one_over_the_least_distance_between_them() -> None:
    """The published code scores pairs of one label; here the two 1s lie nearest to each other and do not count."""
    X = torch.tensor([[0.0], [3.0], [3.1], [10.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2])
    finding = label_sharpness(X, y)
    assert finding.value == pytest.approx(1 / 3)
    assert (finding.n, finding.uncertainty, finding.at_least) == (6, 0.0, False)
    assert label_sharpness(X, y.double()).value == pytest.approx(1 / 3)  # |1 − 0| / 3 > |2 − 1| / 6.9
    assert label_sharpness(X, y, classes=False).unit == "label / distance"


def test_sharpness_of_drawn_pairs_is_a_lower_bound() -> None:
    X = gaussian(400, 3, 3, seed=0)
    y = X[:, 0].sin()
    everything, some = label_sharpness(X, y), label_sharpness(X, y, pairs=500)
    assert everything.n == 400 * 399 // 2
    assert some.at_least
    assert some.n == 500
    assert float(some) <= float(everything) <= 1.0
    low, high = everything.details["quantile_interval"]
    assert low <= everything.details["quantile"] <= high <= float(everything)
    again = label_sharpness(2 * X, y)
    assert again.value == pytest.approx(float(everything) / 2)
    assert again.details["width"] == pytest.approx(2 * everything.details["width"])


def test_no_point_is_paired_with_itself() -> None:
    X = torch.arange(1000.0)[:, None]
    assert label_sharpness(X, torch.zeros(1000), pairs=5000).details["contradictions"] == 0
    assert float(label_sharpness(X, X[:, 0], pairs=5000)) == pytest.approx(1.0)


def test_equal_points_with_different_labels_are_counted() -> None:
    X = torch.tensor([[0.0], [0.0], [1.0]])
    finding = label_sharpness(X, torch.tensor([0, 1, 1]))
    assert finding.value == 1.0
    assert finding.details["contradictions"] == 1
    assert "1 pairs" in finding.notes[0]
    assert label_sharpness(torch.ones(3, 1), torch.tensor([0, 0, 1])).value is None
    assert label_sharpness(torch.ones(1, 1), torch.tensor([0])).value is None


def test_labels_that_do_not_fit_raise() -> None:
    X = torch.randn(4, 2)
    with pytest.raises(InputError, match="2 problems"):
        label_sharpness(X, torch.zeros(3), pairs=0)
    with pytest.raises(InputError, match="one label a row"):
        label_sharpness(X, torch.zeros(4, 2))
    with pytest.raises(NotFiniteError, match="y"):
        label_sharpness(X, torch.tensor([0.0, 1.0, torch.nan, 0.0]))


def test_scaling_law_and_its_interval() -> None:
    assert float(loss_scaling(100, 1600, dimension=2.0)) == pytest.approx(0.25)
    assert float(loss_scaling(1600, 100, dimension=2.0)) == pytest.approx(4.0)
    d = Finding(name="dimension", value=4.0, uncertainty=0.01, at_least=True)
    finding = loss_scaling(100, 1000, dimension=d)
    ends = [10 ** (-1 / 3.99), 10 ** (-1 / 4.01)]
    assert finding.uncertainty == pytest.approx((ends[1] - ends[0]) / 2, rel=1e-3)
    assert finding.at_least
    assert loss_scaling(100, 1000, dimension=two_nn(gaussian(200, 2, 3, seed=0))).uncertainty
    with pytest.raises(InputError, match="2 problems"):
        loss_scaling(0, 10, dimension=Finding(name="dimension", value=None))


def test_entropy_of_far_clusters_is_that_of_their_number() -> None:
    """k clusters without width, so far apart that no walk crosses: k eigenvalues of 1, log₂ k bits."""
    for k in (3, 8):
        centres = 100 * torch.eye(k, dtype=torch.float64)
        X = centres.repeat(4, 1) + 1e-6 * gaussian(4 * k, k, k, seed=0)
        assert float(spectral_entropy(X, bandwidth=0.05)) == pytest.approx(math.log2(k), abs=1e-6)
        labels = torch.arange(k).repeat(4)
        assert float(spectral_information(X, labels, bandwidth=0.05)) <= math.log2(k)


def test_entropy_is_that_of_the_walk() -> None:
    """The spectrum of D⁻¹G, which is not symmetric, by eigvals."""
    X = gaussian(30, 3, 3, seed=0)
    distances = torch.cdist(X, X)
    sigma = 0.5 * distances[torch.ones(30, 30).triu(1).bool()].median()
    G = (-distances.square() / (2 * sigma**2)).exp()
    p = torch.linalg.eigvals(G / G.sum(1, keepdim=True)).abs().square()
    p = p / p.sum()
    finding = spectral_entropy(X, t=2.0)
    assert float(finding) == pytest.approx(float(-(p * p.log2()).sum()), rel=1e-6)
    assert finding.details["relative"] == pytest.approx(float(finding) / math.log2(30))
    assert finding.uncertainty is None


def test_units_do_not_matter_and_n_is_fixed() -> None:
    X = gaussian(400, 5, 5, seed=0)
    finding = spectral_entropy(X, points=200)
    assert float(spectral_entropy(1e3 * X + 7, points=200)) == pytest.approx(float(finding), rel=1e-9)
    assert finding.n == 200
    assert finding.uncertainty
    more = spectral_entropy(gaussian(4000, 5, 5, seed=1), points=200)
    assert float(more) == pytest.approx(float(finding), abs=0.15)
    assert float(spectral_entropy(X, points=400)) > float(finding) + 0.2  # why n is fixed


def test_information_is_nothing_for_random_labels_and_no_more_than_the_labels_hold() -> None:
    X = gaussian(400, 4, 4, seed=0)
    labels = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    assert abs(float(spectral_information(X, labels))) < 0.05
    apart = spectral_information(X + 50 * torch.eye(4, dtype=torch.float64)[labels], labels, bandwidth=0.1)
    assert apart.details["labels"] == pytest.approx(2.0, abs=0.02)
    assert 0.8 * 2 < float(apart) < 2.05


def test_entropy_of_bad_input() -> None:
    X = torch.randn(20, 3)
    for finding in (
        spectral_entropy(torch.full((20, 3), 0.1)),
        spectral_entropy(torch.ones(1, 3)),
        spectral_information(X, torch.zeros(20, dtype=torch.long)),
        spectral_information(torch.ones(20, 3), torch.arange(20) % 2),
    ):
        assert finding.value is None
        assert finding.notes
    with pytest.raises(InputError, match="bucketize"):
        spectral_information(X, torch.randn(20))
    with pytest.raises(InputError, match="4 problems"):
        spectral_entropy(X, points=1, bandwidth=0, t=-1, repeats=0)
    with pytest.raises(NotFiniteError):
        spectral_entropy(X * torch.inf)
