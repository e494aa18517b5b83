"""The law of Marchenko and Pastur against its density, its moments and drawn matrices."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from eckart.errors import InputError
from eckart.linalg.noise import noise_cdf, noise_edges, noise_quantiles, noise_spectrum, noise_top

ASPECTS = (1, 1.5, 2, 4, 8, 80)


def density(x: float, c: float) -> float:
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    return math.sqrt(max((x - low) * (high - x), 0)) / (2 * math.pi * c * x)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_cdf_is_the_integral_of_the_density(aspect: float) -> None:
    c = 1 / aspect
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    for share in (0.1, 0.5, 0.9):
        x = low + share * (high - low)
        # From above, where the density is bounded also for c = 1.
        expected = 1 - quad(density, x, high, args=(c,))[0]
        assert float(noise_cdf(torch.tensor([x], dtype=torch.float64), aspect)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_quantiles_invert_the_cdf_and_end_at_the_edges(aspect: float) -> None:
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = noise_quantiles(levels, aspect)
    assert torch.all(x.diff() > 0)
    assert torch.allclose(noise_cdf(x, aspect), levels, atol=1e-9)
    low, high = noise_edges(100, round(100 * aspect))
    assert math.sqrt(float(x[0]) * 100 * aspect) == pytest.approx(low, abs=1e-3 * high)
    assert math.sqrt(float(x[-1]) * 100 * aspect) == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_mean_is_one_and_variance_is_c(aspect: float) -> None:
    x = noise_quantiles((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000, aspect)
    assert float(x.mean()) == pytest.approx(1, abs=1e-4)
    assert float(x.var()) == pytest.approx(1 / aspect, rel=1e-3)


@pytest.mark.parametrize(("m", "n"), [(100, 100), (300, 100), (60, 480)])
def test_spectrum_is_that_of_a_drawn_matrix(m: int, n: int) -> None:
    W = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = noise_spectrum(m, n)
    assert expected.shape == (min(m, n),)
    assert float((torch.linalg.svdvals(W) - expected).abs().max()) < 0.06 * float(expected[0])


def test_the_largest_value_stays_below_its_quantiles_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    top = torch.linalg.svdvals(torch.randn(400, 40, 80, dtype=torch.float64, generator=generator))[:, 0]
    for level, slack in ((0.5, 0.08), (0.95, 0.03), (0.99, 0.015)):
        assert float((top < noise_top(40, 80, level)).double().mean()) == pytest.approx(level, abs=slack)


def test_refuses_what_is_no_aspect_and_no_level() -> None:
    with pytest.raises(InputError, match="at least 1"):
        noise_quantiles(torch.tensor([0.5]), 0.5)
    with pytest.raises(InputError, match="level"):
        noise_top(4, 4, 0.9)
