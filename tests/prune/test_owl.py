"""OWL's shares."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.prune import owl_shares
from eckart.prune.owl import balanced

SCORES = {f"m{i}": torch.rand(20, 10 * (i + 1), generator=torch.Generator().manual_seed(i)) for i in range(4)}
for i in range(4):
    SCORES[f"m{i}"][: (i + 1) ** 2, 0] = 100.0


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.95])
def test_meets_the_total_within_bounds(keep: float) -> None:
    shares = owl_shares(SCORES, keep, spread=0.2)
    total = sum(SCORES[n].numel() * s for n, s in shares.items())
    assert total == pytest.approx(keep * sum(s.numel() for s in SCORES.values()), rel=1e-6)
    assert all(0.01 <= s <= 1 for s in shares.values())


def test_shares_follow_the_share_of_outliers() -> None:
    scores = {"a": torch.ones(10, 10), "b": torch.ones(10, 10), "c": torch.ones(10, 10)}
    scores["b"][0, :2], scores["c"][0, :4] = 100.0, 100.0
    shares = owl_shares(scores, 0.4, spread=0.1)
    outliers = {n: float((s > 5 * s.mean()).double().mean()) for n, s in scores.items()}
    assert outliers == {"a": 0.0, "b": pytest.approx(0.02), "c": pytest.approx(0.04)}
    assert shares == {"a": pytest.approx(0.3), "b": pytest.approx(0.4), "c": pytest.approx(0.5)}


def test_maps_of_a_block_share_one_share() -> None:
    shares = owl_shares(SCORES, 0.4, groups={"m0": 0, "m1": 0, "m2": 1, "m3": 1})
    assert shares["m0"] == shares["m1"] != shares["m2"] == shares["m3"]


def test_balanced_clips_and_spreads_the_rest() -> None:
    shares = balanced({"a": 0.9, "b": 0.0}, {"a": 10, "b": 10}, 0.7)
    assert shares == {"a": 1.0, "b": pytest.approx(0.4)}


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"(?s)threshold.*spread"):
        owl_shares(SCORES, 0.5, threshold=0, spread=1)
    with pytest.raises(NotFiniteError, match="bad"):
        owl_shares({"bad": torch.full((2, 2), float("nan"))}, 0.5)
