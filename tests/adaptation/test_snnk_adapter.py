"""SNNK: the features, and that it says what it cannot do."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.adaptation import Layout, Source
from eckart.adaptation.snnk import Options, SnnkDelta, directions
from eckart.errors import EckartError, InputError

LAYOUT = Layout(name="up", kind="linear", out_features=7, in_features=12)


def started(options: Options) -> SnnkDelta:
    delta = SnnkDelta(LAYOUT, 5, options)
    delta.start(Source(layout=LAYOUT, weight=torch.ones(1, 7, 12)))
    delta.fill(C=torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
    return delta


@pytest.mark.parametrize("floor", [0.0, -0.5])
def test_is_one_matrix_on_random_features(floor: float) -> None:
    delta = started(Options(floor=floor))
    x = torch.randn(4, 12)
    naive = torch.maximum(x @ delta.G.T, torch.tensor(floor)) / math.sqrt(5) @ delta.C.T
    torch.testing.assert_close(delta(x, torch.zeros(4, 7)), naive)


def test_directions_are_orthogonal_with_normal_lengths() -> None:
    G = directions(5, 12, True, torch.Generator().manual_seed(0))
    plain = directions(5, 12, False, torch.Generator().manual_seed(0))
    gram = G @ G.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-12, rtol=0)
    torch.testing.assert_close(G.norm(dim=1), plain.norm(dim=1))


def test_kernel_of_the_features_is_the_arc_cosine_one() -> None:
    """E[max(g·x, 0) max(g·w, 0)] = ‖x‖‖w‖ (sin θ + (π − θ) cos θ) / 2π for normal g (Cho, Saul, 2009)."""
    x, w = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    features = torch.cat([directions(6, 6, False, generator) for _ in range(20_000)]) * math.sqrt(6)
    found = float(((features @ x).clamp(min=0) * (features @ w).clamp(min=0)).mean())
    angle = math.acos(float(x @ w / (x.norm() * w.norm())))
    exact = float(x.norm() * w.norm()) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    assert found == pytest.approx(exact, rel=0.03)


def test_is_no_change_of_the_weight_and_says_so() -> None:
    with pytest.raises(EckartError, match="not linear in its input"):
        started(Options()).delta()
    assert started(Options()).factors() is None
    conv = Layout(name="c", kind="conv", out_features=4, in_features=18, kernel=(3, 3))
    table = Layout(name="t", kind="embedding", out_features=4, in_features=30)
    assert "patches" in str(SnnkDelta.fits(conv, Options()))
    assert "entries" in str(SnnkDelta.fits(table, Options()))


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="2 problems"):
        Options(orthogonal=1, floor=math.nan)  # type: ignore[arg-type]
