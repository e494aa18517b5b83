"""Noise reads as noise, and what is planted is found and named, at every aspect."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.noise import noise_top
from eckart.spectra import farms, marchenko_pastur, power_law, singular_values, verdict
from eckart.spectra.kinds import planted
from eckart.spectra.tails import best_tail, hill
from eckart.spectra.windows import noise_alpha

ASPECTS = (1, 2, 4, 8)
every_aspect = pytest.mark.parametrize("aspect", ASPECTS)


def noise(m: int, n: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(m, n, dtype=torch.float64, generator=generator)


@every_aspect
def test_noise_is_at_no_distance_from_noise(aspect: int) -> None:
    """Within the stated 95 % interval in at least 17 of 20 draws (fewer in 1 of 60 tests), no more bias than stated."""
    generator = torch.Generator().manual_seed(0)
    found = [farms(noise(64, 64 * aspect, generator))["distance_from_noise"] for _ in range(20)]
    inside = [abs(float(f)) <= (f.uncertainty or 0) for f in found]
    assert sum(inside) >= 17
    mean = sum(float(f) for f in found) / len(found)
    stated = 0.3 * (found[0].details["noise"] - 1) / 64
    assert abs(mean) < 2.5 * (found[0].uncertainty or 0) / 1.96 / math.sqrt(len(found)) + stated


@every_aspect
def test_what_noise_scores_by_shape(aspect: int) -> None:
    """The exponents of Marchenko and Pastur by integration: 2.12, 2.71, 3.45, 4.47 for large matrices."""
    expected = {1: 2.12, 2: 2.71, 4: 3.45, 8: 4.47}[aspect]
    assert noise_alpha(4000, aspect) == pytest.approx(expected, abs=0.01)


@every_aspect
def test_windows_of_a_given_aspect_too(aspect: int) -> None:
    found = farms(noise(80, 640, torch.Generator().manual_seed(1)), aspect=aspect, rows=64)
    assert abs(float(found["distance_from_noise"])) <= 1.5 * (found["distance_from_noise"].uncertainty or 0)
    rows, columns = found["alpha_farms"].details["window"]
    assert columns == aspect * rows


def test_entries_need_not_be_gaussian() -> None:
    W = torch.rand(100, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    distance = farms(W)["distance_from_noise"]
    assert abs(float(distance)) <= 1.5 * (distance.uncertainty or 0)
    assert verdict(W).details["verdict"] == "fits noise"


@every_aspect
def test_planted_spectra_are_named(aspect: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for word in ("fits noise", "spikes above noise", "heavy tail"):
        named = [verdict(planted(word, aspect, generator)).details["verdict"] for _ in range(4)]
        assert named.count(word) >= 3, (word, named)


@every_aspect
def test_scale_and_spikes_of_a_planted_matrix(aspect: int) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n = 120, 120 * aspect
    W = noise(m, n, generator, scale=0.05)
    strengths = 0.05 * noise_top(m, n) * torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(noise(k, 3, generator)).Q for k in (m, n))
    found = marchenko_pastur(W + left * strengths @ right.T)
    assert found["spikes"].value == 3
    assert abs(float(found["noise_scale"]) - 0.05) < 2 * (found["noise_scale"].uncertainty or 0)
    assert float(found["bulk_fit"]) > 0.95
    values = torch.linalg.svdvals(W + left * strengths @ right.T).square()
    assert float(found["spike_energy"]) == pytest.approx(float(values[:3].sum() / values.sum()))


def test_noise_rarely_shows_a_spike() -> None:
    generator = torch.Generator().manual_seed(0)
    spikes = [float(marchenko_pastur(noise(40, 80, generator))["spikes"]) for _ in range(200)]
    assert sum(k > 0 for k in spikes) <= 8  # 1 % on average; more than 8 of 200 in 1 of 10 000


def test_an_orthogonal_weight_is_no_noise() -> None:
    Q = torch.linalg.qr(noise(60, 60, torch.Generator().manual_seed(0))).Q
    assert verdict(Q).details["verdict"] == "no noise"


def test_the_fit_is_invariant_to_rotation_scale_and_transposition() -> None:
    generator = torch.Generator().manual_seed(0)
    W = noise(40, 90, generator)
    Q = torch.linalg.qr(noise(40, 40, generator)).Q
    for other in (Q @ W, W.T, 1e-6 * W):
        one, two = marchenko_pastur(W), marchenko_pastur(other)
        assert float(one["bulk_fit"]) == pytest.approx(float(two["bulk_fit"]), abs=1e-6)
        assert power_law(W)["alpha_ks"].value == pytest.approx(power_law(other)["alpha_ks"].value, rel=1e-6)


def naive_tail(eigenvalues: list[float], fewest: int) -> tuple[float, float, int]:
    """Every start, every eigenvalue, in plain Python."""
    ordered = sorted(eigenvalues, reverse=True)
    best = (math.inf, 0.0, 0)
    for k in range(fewest, len(ordered) + 1):
        tail, start = ordered[:k], ordered[k - 1]
        mean = sum(math.log(x / start) for x in tail) / k
        if mean == 0:
            continue
        alpha = 1 + 1 / mean
        gap = 0.0
        for i, x in enumerate(tail):
            above = (x / start) ** (1 - alpha)
            gap = max(gap, abs(above - i / k), abs(above - (i + 1) / k))
        best = min(best, (gap, alpha, k))
    return best


def test_best_tail_agrees_with_its_naive_twin() -> None:
    for seed in range(3):
        x = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).pow(-0.7)
        found = best_tail(x)
        distance, alpha, size = naive_tail(x.tolist(), 8)
        assert (found.distance, found.alpha, found.size) == pytest.approx((distance, alpha, size))


def test_hill_of_an_exact_power_law() -> None:
    quantiles = ((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000).pow(-1 / 1.5)  # falling, exponent 2.5
    assert hill(quantiles, 2500) == pytest.approx(2.5, abs=0.01)
    assert hill(torch.ones(10), 5) == math.inf


def test_farms_of_kernels_takes_one_matrix_per_position() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(32, 48, 3, 3, generator=generator)
    found = farms(kernel)["alpha_farms"]
    stack = farms(kernel.permute(2, 3, 0, 1).reshape(9, 32, 48))["alpha_farms"]
    assert found.value == pytest.approx(stack.value)
    assert found.details["window"] == [32, 32]


def test_windows_do_not_depend_on_orientation_or_scale() -> None:
    W = noise(40, 100, torch.Generator().manual_seed(0))
    values = [farms(x)["alpha_farms"].value for x in (W, W.T, 1e8 * W)]
    assert values == pytest.approx([values[0]] * 3)


def test_too_small_and_rank_deficient_weights_say_so() -> None:
    small = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for found in (farms(small), marchenko_pastur(small), power_law(small), {"verdict": verdict(small)}):
        assert all(f.value is None and f.notes for f in found.values())
    low = small.T @ small
    for found in (farms(low), marchenko_pastur(low), power_law(low)):
        assert all(f.value is None and f.notes for f in found.values())


def test_options_out_of_range() -> None:
    W = torch.randn(20, 20)
    for option in ({"rows": 2}, {"aspect": 0}, {"places": 0}, {"rows": 3.5}):
        with pytest.raises(InputError, match=next(iter(option))):
            farms(W, **option)  # type: ignore[arg-type]


def test_a_spectrum_is_used_as_it_is() -> None:
    W = noise(30, 40, torch.Generator().manual_seed(0))
    s = singular_values(W)
    assert marchenko_pastur(s) == marchenko_pastur(W)
    assert power_law(s) == power_law(W)
