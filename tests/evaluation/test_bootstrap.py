"""Intervals: what they must be for constants, for known distributions, and when paired."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError
from eckart.evaluation import bootstrap, resample


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_resample_draws_n_units() -> None:
    counts = resample(37, resamples=50, seed=3)
    assert counts.shape == (50, 37)
    assert torch.equal(counts.sum(1), torch.full((50,), 37.0, dtype=torch.float64))


def test_same_seed_same_counts_other_seed_others() -> None:
    assert torch.equal(resample(20, seed=1), resample(20, seed=1))
    assert not torch.equal(resample(20, seed=1), resample(20, seed=2))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    resample(20, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_constant_has_no_width() -> None:
    found = bootstrap(torch.full((30,), 0.25, dtype=torch.float64), counts=resample(30))
    assert found.mean == found.low == found.high == 0.25
    assert found.n == 30


def test_width_of_a_mean_is_that_of_theory() -> None:
    values = normal(400, 0)
    found = bootstrap(values, counts=resample(400, resamples=4000))
    expected = 2 * 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(expected, rel=0.08)
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(200):
        found = bootstrap(normal(60, seed) + 1, counts=resample(60, resamples=300, seed=seed))
        covered += found.low <= 1 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_ratio_counts_by_its_weights() -> None:
    found = bootstrap(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]), counts=resample(2))
    assert found.mean == 2.5
    assert (found.low, found.high) == (1.0, 3.0)


def test_pairing_takes_out_what_two_figures_share() -> None:
    shared, small = normal(100, 1) * 10, normal(100, 2) * 0.1
    counts = resample(100)
    rise = bootstrap(shared + small - shared, counts=counts)
    alone = bootstrap(shared + small, counts=counts)
    assert rise.high - rise.low < 0.05 * (alone.high - alone.low)


def test_unweighted_resamples_without_weight_are_left_out() -> None:
    found = bootstrap(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 2.0]), counts=resample(2))
    assert (found.low, found.high) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        (torch.tensor([1.0, float("nan")]), None),
        (torch.tensor([1.0, 2.0]), torch.zeros(2)),
        (torch.tensor([1.0, 2.0, 3.0]), None),
        (torch.ones(1, 2), None),
    ],
)
def test_bad_values_are_named(values: torch.Tensor, weights: torch.Tensor | None) -> None:
    with pytest.raises(InputError, match="expected"):
        bootstrap(values, weights, counts=resample(2))


def test_no_units_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one"):
        resample(0)
