"""Wanda and magnitude: scores and masks by their definitions."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import InputError
from eckart.prune import magnitude_masks, wanda_mask, wanda_scores

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(6, 16, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(40, 16, generator=GENERATOR, dtype=torch.float64) * torch.arange(1, 17)


def test_score_is_weight_times_norm_of_the_input() -> None:
    expected = torch.empty_like(W)
    for i in range(6):
        for j in range(16):
            expected[i, j] = abs(W[i, j]) * X[:, j].norm() / 40**0.5
    torch.testing.assert_close(wanda_scores(W, X.T @ X / 40), expected)
    torch.testing.assert_close(wanda_scores(W, X.square().mean(0)), expected)


def test_rows_keep_the_same_number() -> None:
    scores, mask = wanda_scores(W, X.T @ X / 40), wanda_mask(W, X.T @ X / 40, 0.5)
    for i in range(6):
        assert set(mask[i].nonzero().flatten().tolist()) == set(scores[i].argsort(descending=True)[:8].tolist())


def test_two_of_four() -> None:
    mask = wanda_mask(W, X.T @ X / 40, pattern="2:4")
    assert bool((mask.view(6, 4, 4).sum(-1) == 2).all())


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="in, in"):
        wanda_mask(W, torch.ones(3), 0.5)


def test_magnitude_scopes() -> None:
    weights = {"a": W, "b": 10 * W[:2]}
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    edge = flat.sort(descending=True).values[len(flat) // 2 - 1]
    for name, mask in magnitude_masks(weights, 0.5).items():
        assert torch.equal(mask, weights[name].abs() >= edge)
    assert [int(m.sum()) for m in magnitude_masks(weights, 0.25, scope="layer").values()] == [24, 8]
    assert bool((magnitude_masks(weights, 0.25, scope="row")["a"].sum(1) == 4).all())
    assert int(magnitude_masks(weights, 0.4, floor=25)["a"].sum()) == 25


def test_magnitude_options() -> None:
    with pytest.raises(InputError, match="scope"):
        magnitude_masks({"a": W}, 0.5, scope="colum")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="floor"):
        magnitude_masks({"a": W}, 0.5, scope="row", floor=3)
