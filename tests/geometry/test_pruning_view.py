"""Pruning view: norms, angles and margins against loops, what is lost and won, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import pruning_view, sample_geometry


def test_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(3, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = sample_geometry(H, W, y, b)
    for i, (h, c) in enumerate(zip(H, y.tolist(), strict=True)):
        angle = math.degrees(math.acos(float(h @ W[c] / (h.norm() * W[c].norm()))))
        margins = [float(((W[c] - W[k]) @ h + b[c] - b[k]) / (W[c] - W[k]).norm()) for k in range(3) if k != c]
        assert float(found.norm[i]) == pytest.approx(float(h.norm()))
        assert float(found.angle[i]) == pytest.approx(angle)
        assert float(found.margin[i]) == pytest.approx(min(margins))
    assert torch.equal(found.margin > 0, (H @ W.T + b).argmax(1) == y)


def test_the_margin_is_the_distance_to_the_boundary() -> None:
    generator = torch.Generator().manual_seed(0)
    H, W = (torch.randn(s, 5, generator=generator, dtype=torch.float64) for s in (6, 4))
    y = (H @ W.T).argmax(1)
    margin = sample_geometry(H, W, y).margin
    for h, c, m in zip(H, y.tolist(), margin.tolist(), strict=True):
        directions = [(W[k] - W[c]) / (W[k] - W[c]).norm() for k in range(4) if k != c]
        assert all(int((W @ (h + 0.999 * m * u)).argmax()) == c for u in directions)
        assert any(int((W @ (h + 1.001 * m * u)).argmax()) != c for u in directions)


def test_the_same_model_twice_has_not_changed() -> None:
    H, W, y = torch.randn(20, 4), torch.randn(3, 4), torch.arange(20) % 3
    view = pruning_view(H, H, W, W, y)
    assert all(float(finding) == 0 for finding in view.values())


def test_doubled_features_double_the_margin_and_turn_nothing() -> None:
    H, W, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.arange(20) % 3
    view = pruning_view(H, 2 * H, W, W, y)
    assert float(view["norm_change"]) == pytest.approx(math.log(2))
    assert float(view["angle_change"]) == pytest.approx(0, abs=1e-5)
    assert view["margin_change"].details["after"] == pytest.approx(
        [2 * m for m in view["margin_change"].details["before"]]
    )
    assert float(view["lost"]) == 0


def test_lost_and_won_and_models_of_different_width() -> None:
    before = torch.tensor([[3.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
    after = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    view = pruning_view(before, after, torch.eye(2), torch.eye(2, 3), torch.tensor([0, 0, 0]))
    assert view["lost"].details["samples"] == [1]
    assert view["lost"].details["won"] == [2]
    assert float(view["lost"]) == pytest.approx(1 / 3)
    assert view["lost"].details["margin_of_lost"] < view["lost"].details["margin_of_kept"]


def test_a_representation_of_length_zero_is_said() -> None:
    view = pruning_view(
        torch.eye(2), torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.eye(2), torch.eye(2), torch.arange(2)
    )
    assert view["angle_change"].n == 1
    assert "1 samples of length 0" in view["angle_change"].notes[0]


def test_bad_input() -> None:
    H, W, y = torch.randn(4, 3), torch.randn(2, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match="same samples"):
        pruning_view(H, H[:3], W, W, y)
    with pytest.raises(InputError, match=r"(?s)weight has 5 columns.*two classes.*bias"):
        sample_geometry(H, torch.randn(1, 5), y, torch.zeros(2))
    with pytest.raises(InputError, match="equal rows"):
        sample_geometry(H, torch.ones(2, 3), y)
    with pytest.raises(NotFiniteError):
        sample_geometry(H / 0, W, y)
