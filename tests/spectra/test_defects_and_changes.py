"""What is planted in a weight, or between two, is found: dead and repeated parts, low-rank changes, advice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.records import Finding
from eckart.spectra import defects, difference, learning_rate_factors, pruning_ratios


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts(found: dict[str, Finding]) -> dict[str, float | None]:
    return {name: finding.value for name, finding in found.items() if finding.value}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_planted_defects_are_counted_and_placed(dtype: torch.dtype, transposed: bool) -> None:
    W = randn(12, 20).to(dtype)
    W[3], W[:, 5] = 0, 0
    W[7], W[9] = W[1], W[1]
    W[:, 19] = W[:, 2]
    found = defects(W.T if transposed else W)
    rows, columns = ("columns", "rows") if transposed else ("rows", "columns")
    assert counts(found) == {
        f"dead_{rows}": 1,
        f"dead_{columns}": 1,
        f"duplicate_{rows}": 2,
        f"duplicate_{columns}": 1,
    }
    assert found[f"dead_{rows}"].details["places"] == [3]
    assert found[f"duplicate_{rows}"].details["places"] == [7, 9]
    assert found[f"duplicate_{columns}"].details["places"] == [19]


def test_nothing_is_found_in_noise_of_any_shape() -> None:
    for shape in ((1, 1), (1, 9), (9, 1), (40, 50), (300, 7)):
        assert not counts(defects(randn(*shape))) or 1 in shape
    assert not counts(defects(randn(60, 70)))


def test_multiples_count_only_up_to_scale() -> None:
    W = randn(10, 12)
    W[4], W[8] = -3 * W[2], 1e-3 * W[2]
    assert defects(W)["duplicate_rows"].value == 0
    assert defects(W, up_to_scale=True)["duplicate_rows"].details["places"] == [4, 8]
    nearly = W.clone()
    nearly[4] += 0.1 * randn(12, seed=3)
    assert defects(nearly, up_to_scale=True)["duplicate_rows"].value == 1


def test_constants_stacks_and_nan() -> None:
    assert counts(defects(torch.full((3, 4), 0.5))) == {"constant": 1, "duplicate_rows": 2, "duplicate_columns": 3}
    zero = defects(torch.zeros(3, 4))
    assert (zero["constant"].value, zero["dead_rows"].value, zero["duplicate_rows"].value) == (1, 3, 0)
    stack = randn(3, 6, 8)
    stack[1, 2], stack[2, 5] = 0, stack[2, 0]
    found = defects(stack)
    assert found["dead_rows"].details["places"] == [[1, 2]]
    assert found["duplicate_rows"].details["places"] == [[2, 5]]
    W = randn(3, 4)
    W[0, 1], W[2, 2] = float("nan"), float("inf")
    broken = defects(W)
    assert broken["not_finite"].value == 2
    assert all(f.value is None and "2 of 12" in f.notes[0] for name, f in broken.items() if name != "not_finite")


def test_large_sums_are_not_taken_for_nan() -> None:
    """The quick look for NaN is a sum, which may overflow where no entry is infinite."""
    assert defects(torch.full((8, 8), 6e4, dtype=torch.float16))["not_finite"].value == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_low_rank_change_is_measured(dtype: torch.dtype) -> None:
    W0 = randn(40, 60).to(dtype)
    change = (randn(40, 3, seed=1) @ randn(3, 60, seed=2)).to(dtype)
    found = difference(W0 + change, W0)
    assert float(found["delta_relative"]) == pytest.approx(float(change.norm() / W0.norm()), rel=1e-5)
    assert found["delta_rank_99"].value == 3
    assert float(found["delta_lora_rank"]) <= 3
    assert float(difference(W0 + change, W0, energy=1 - 1e-9)["delta_lora_rank"]) == 3


def test_overlaps_of_changes_inside_and_outside_of_the_base() -> None:
    Q, P = torch.linalg.qr(randn(40, 40)).Q, torch.linalg.qr(randn(60, 40, seed=1)).Q
    W0 = Q * torch.linspace(2, 1, 40, dtype=torch.float64) @ P.T
    inside = difference(W0 + 0.1 * Q[:, :3] @ P[:, :3].T, W0)
    outside = difference(W0 + 0.1 * Q[:, -3:] @ P[:, -3:].T, W0)
    for side in ("left", "right"):
        assert float(inside[f"delta_overlap_{side}"]) == pytest.approx(1)
        assert float(outside[f"delta_overlap_{side}"]) == pytest.approx(0, abs=1e-9)
    assert inside["delta_overlap_left"].details["unrelated"] == pytest.approx(3 / 40)
    assert float(inside["delta_gain"]) < float(outside["delta_gain"])


def test_equal_weights_zero_bases_and_other_shapes() -> None:
    W = randn(6, 9)
    same = difference(W, W.clone())
    assert same["delta_relative"].value == 0
    assert same["delta_lora_rank"].value is None
    assert "nothing changed" in same["delta_lora_rank"].notes
    assert difference(W, torch.zeros_like(W))["delta_relative"].value is None
    with pytest.raises(InputError, match="same shape"):
        difference(W, W.T)
    rounded = difference(W.float(), W.float().bfloat16())["delta_relative"]
    assert "bfloat16" in rounded.notes[0]
    assert 0 < float(rounded) < 0.004
    assert all(f.value is None for f in difference(W, torch.full_like(W, float("nan"))).values())


def test_without_vectors_nothing_of_them_is_given() -> None:
    W = randn(6, 9)
    assert not any("overlap" in name or "gain" in name for name in difference(W, W + 1, vectors=False))


def test_learning_rates_are_linear_in_alpha() -> None:
    alphas = {"a": 2.0, "b": 4.0, "c": Finding(name="alpha_farms", value=3.5), "d": Finding(name="x", value=None)}
    assert learning_rate_factors(alphas, low=0.5, high=1.5) == pytest.approx({"a": 0.5, "b": 1.5, "c": 1.25, "d": 1})
    assert learning_rate_factors({"a": 2.0, "b": 2.0}) == {"a": 1.0, "b": 1.0}
    assert learning_rate_factors({}) == {}
    for low, high in ((0, 1), (2, 1), (1, float("inf"))):
        with pytest.raises(InputError, match="low"):
            learning_rate_factors({"a": 2.0}, low=low, high=high)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.95, 0.99])
def test_pruning_ratios_meet_the_total(sparsity: float) -> None:
    alphas = {"a": 1.5, "b": 2.0, "c": 4.0, "d": float("nan")}
    sizes = {"a": 1000, "b": 50, "c": 300, "d": 70}
    ratios = pruning_ratios(alphas, sizes, sparsity=sparsity, spread=0.4)
    total = sum(sizes[name] * ratio for name, ratio in ratios.items())
    assert total == pytest.approx(sparsity * sum(sizes.values()), rel=1e-6)
    assert all(0 <= ratio <= 0.99 for ratio in ratios.values())
    assert ratios["a"] <= ratios["b"] <= ratios["c"]
    assert pruning_ratios(alphas, sizes, sparsity=sparsity, spread=0.0) == pytest.approx(
        dict.fromkeys(alphas, sparsity)
    )


def test_pruning_ratios_say_all_that_is_wrong() -> None:
    with pytest.raises(InputError, match="3 problems"):
        pruning_ratios({"a": 2.0}, {}, sparsity=1.5, spread=1)
