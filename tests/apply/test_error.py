"""The exact output error from moments, against the error measured on the data itself."""

from __future__ import annotations

import pytest
import torch

from eckart.apply.error import relative_error, weighted_square
from eckart.moments import SiteMoments


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in {"W": (5, 7), "V": (5, 7), "X": (40, 7), "g": (40, 5)}.items()
    }


def moments_of(X: torch.Tensor, g: torch.Tensor | None = None) -> SiteMoments:
    return SiteMoments(
        count=len(X),
        mean=X.mean(0),
        second=X.T @ X / len(X),
        gradient=None if g is None else g.T @ g / len(g),
    )


def test_without_gradients_it_is_the_mean_squared_output_error(data):
    measured = (data["X"] @ data["W"].T).square().sum(1).mean()
    assert weighted_square(data["W"], moments_of(data["X"]), centred=False) == pytest.approx(float(measured))


def test_centred_leaves_out_what_a_bias_takes_up(data):
    Y = data["X"] @ data["W"].T
    measured = (Y - Y.mean(0)).square().sum(1).mean()
    assert weighted_square(data["W"], moments_of(data["X"]), centred=True) == pytest.approx(float(measured))


def test_gradients_weigh_outputs(data):
    moments = moments_of(data["X"], data["g"])
    W = data["W"]
    expected = torch.trace(moments.gradient @ W @ moments.second @ W.T)
    assert weighted_square(W, moments, centred=False) == pytest.approx(float(expected))


def test_diagonal_moments_are_frequencies(data):
    frequencies = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = SiteMoments(count=9, second=frequencies)
    expected = (data["W"].square() * frequencies).sum()
    assert weighted_square(data["W"], moments, centred=False) == pytest.approx(float(expected))


def test_relative_error_runs_from_nothing_to_everything(data):
    moments = moments_of(data["X"])
    assert relative_error(data["W"], data["W"], moments, centred=False) == 0
    assert relative_error(data["W"], torch.zeros_like(data["W"]), moments, centred=False) == pytest.approx(1)
    assert relative_error(torch.zeros_like(data["W"]), data["V"], moments, centred=False) == 0
