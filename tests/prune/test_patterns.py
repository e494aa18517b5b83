"""Patterns: exact counts, ties by index, words, floors, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import BudgetError, InputError, NotFiniteError
from eckart.prune import NofM, Row, Runs, Unstructured, Whole, erk_shares, global_masks, parse_pattern
from eckart.prune.patterns import check_fits, count, highest


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_highest(scores: list[float], k: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return [i in order for i in range(len(scores))]


@pytest.mark.parametrize("k", range(8))
def test_highest_agrees_with_a_sort_and_ties_go_to_the_lower_index(k: int) -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0, 1.0, float("inf")])
    assert highest(scores, k).tolist() == naive_highest(scores.tolist(), k)
    assert highest(torch.zeros(7), k).tolist() == [i < k for i in range(7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("words", "keep", "kept"),
    [
        ("unstructured", 0.3, 28),
        ("row", 0.3, 8 * 3),
        ("2:4", None, 48),
        ("keep 1 of 3", 1 / 3, 32),
        ("runs of 4", 0.26, 24),
        ("outputs", 0.3, 24),
        ("inputs", 0.26, 24),
    ],
)
def test_counts_are_exact_and_from_below(words: str, keep: float | None, kept: int, dtype: torch.dtype) -> None:
    scores = gaussian(8, 12).abs().to(dtype)
    mask = parse_pattern(words).mask(scores, keep)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == kept
    again = parse_pattern(words).mask(torch.zeros(8, 12), keep)
    assert torch.equal(again, parse_pattern(words).mask(torch.zeros(8, 12), keep))
    assert int(again.sum()) == kept


def test_n_of_m_counts_what_stays() -> None:
    scores = torch.arange(16.0).reshape(2, 8)
    assert parse_pattern("keep 2 of 8").mask(scores).int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]] * 2
    assert parse_pattern("2:8") == NofM(2, 8) == parse_pattern("2 of 8")
    assert parse_pattern("2:8").mask(scores).sum() == 4


def test_rows_runs_and_whole_rows() -> None:
    scores = torch.tensor([[1.0, 9.0, 2.0, 3.0], [4.0, 0.0, 8.0, 7.0]])
    assert Row().mask(scores, 0.25).int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert Runs(2).mask(scores, 0.5).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert Whole(outputs=True).mask(scores, 0.5).int().tolist() == [[0] * 4, [1] * 4]
    assert Whole(outputs=False).mask(scores, 0.5).int().tolist() == [[0, 0, 1, 1]] * 2


def test_words_both_ways_and_unknown_words() -> None:
    for pattern in (Unstructured(), Row(), NofM(2, 4), Runs(16), Whole(), Whole(outputs=False)):
        assert parse_pattern(str(pattern)) == pattern
        assert parse_pattern(pattern) is pattern
    with pytest.raises(InputError, match="Did you mean 'unstructured'"):
        parse_pattern("unstructred")
    for wrong in ("4:2", "0:4", "keep 5 of 4", "runs of 0"):
        with pytest.raises(InputError):
            parse_pattern(wrong)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), True, "half"])
def test_shares_out_of_range(keep: object) -> None:
    with pytest.raises(InputError, match="in \\(0, 1\\]"):
        Unstructured().mask(gaussian(3, 4), keep)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="in \\(0, 1\\]"):
        global_masks({"a": gaussian(3, 4)}, keep)  # type: ignore[arg-type]


def test_all_may_stay() -> None:
    assert Unstructured().mask(gaussian(3, 4), 1).all()
    assert global_masks({"a": gaussian(3, 4)}, 1)["a"].all()


def test_less_than_one_weight_names_the_least_share() -> None:
    with pytest.raises(BudgetError, match=r"least is 0\.25"):
        Row().mask(gaussian(3, 4), 0.2)
    assert Row().mask(gaussian(3, 4), 0.25).sum() == 3


def test_shapes_that_do_not_divide_are_all_named() -> None:
    shapes = {"good": (4, 8), "short": (4, 6), "vector": (7,)}
    with pytest.raises(InputError) as error:
        check_fits(parse_pattern("2:4"), shapes)
    assert "short: 6 inputs are no multiple of 4" in str(error.value)
    assert "vector" in str(error.value)
    assert "good" not in str(error.value)
    with pytest.raises(InputError, match="no multiple of 4"):
        parse_pattern("2:4").mask(gaussian(4, 6))
    with pytest.raises(InputError, match=r"keeps 0\.5"):
        parse_pattern("2:4").mask(gaussian(4, 8), 0.25)


def test_nan_is_refused_and_infinity_wins() -> None:
    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(NotFiniteError):
        Unstructured().mask(scores, 0.5)
    with pytest.raises(NotFiniteError, match="bad: 1 of 2"):
        global_masks({"bad": scores, "good": torch.ones(1, 2)}, 0.5)
    assert Unstructured().mask(torch.tensor([[5.0, float("inf")]]), 0.5).tolist() == [[False, True]]


def test_global_budget_is_the_ranking_of_all_weights() -> None:
    scores = {"a": gaussian(5, 6).abs(), "b": 0.1 * gaussian(4, 4, seed=1).abs(), "c": 3 * gaussian(2, 3, seed=2).abs()}
    masks = global_masks(scores, 0.37)
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    kept = torch.cat([m.reshape(-1) for m in masks.values()])
    assert kept.tolist() == naive_highest(flat.tolist(), int(0.37 * 52))


def test_floor_keeps_the_best_of_every_layer_and_whole_small_layers() -> None:
    scores = {
        "large": 1 + gaussian(20, 20).abs(),
        "small": 1e-3 * gaussian(10, 10, seed=1).abs(),
        "tiny": torch.ones(1, 2) * 1e-9,
    }
    assert int(global_masks(scores, 0.2)["small"].sum()) == 0
    masks = global_masks(scores, 0.2, floor=7)
    assert sum(int(m.sum()) for m in masks.values()) == int(0.2 * 502)
    assert torch.equal(masks["small"], Unstructured().mask(scores["small"], 0.07))
    assert masks["tiny"].all()
    with pytest.raises(BudgetError, match="Take a keep of at least"):
        global_masks(scores, 0.01, floor=7)


def test_global_budget_over_rows_of_several_sizes_is_met_from_below() -> None:
    scores = {"wide": gaussian(6, 10).abs(), "narrow": gaussian(9, 4, seed=1).abs()}
    masks = global_masks(scores, 0.5, "outputs")
    assert 0 <= 48 - sum(int(m.sum()) for m in masks.values()) < 10
    with pytest.raises(InputError, match="count in every row"):
        global_masks(scores, 0.5, "row")


def test_n_of_m_on_the_way() -> None:
    assert [str(NofM(2, 8).at(k)) for k in (1.0, 0.9, 0.5, 0.26, 0.1)] == [
        "keep 8 of 8", "keep 7 of 8", "keep 4 of 8", "keep 2 of 8", "keep 2 of 8"
    ]  # fmt: skip


def test_counts_survive_rounding() -> None:
    assert [count(k / 10, 30) for k in range(1, 11)] == [3 * k for k in range(1, 11)]
    assert count(0.999999, 10) == 9


def test_erk_meets_the_budget_and_caps_layers() -> None:
    shapes = {"conv": (64, 3, 3, 3), "wide": (512, 512), "head": (10, 512)}
    shares = erk_shares(shapes, 0.1)
    numbers = {"conv": 1728, "wide": 262144, "head": 5120}
    assert sum(shares[n] * numbers[n] for n in shapes) == pytest.approx(0.1 * sum(numbers.values()))
    assert max(shares.values()) <= 1
    assert shares["head"] > shares["wide"]
    assert erk_shares(shapes, 1.0) == {"conv": 1.0, "wide": 1.0, "head": 1.0}
