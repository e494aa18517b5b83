"""Singular values, norms and ranks: against svdvals, closed forms, and each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import InputError
from eckart.spectra import energy_rank, quick_norms, singular_values, spectrum
from eckart.spectra.values import gram


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5), (40, 300), (300, 40), (257, 130)])
def test_values_are_those_of_svdvals(shape: tuple[int, int]) -> None:
    W = randn(*shape)
    expected = torch.linalg.svdvals(W)
    s = singular_values(W)
    assert s.values.shape == (1, min(shape))
    assert torch.allclose(s.values[0], expected, rtol=1e-9, atol=1e-8 * float(expected[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_numbers_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """Whatever the type, the work is done in float64 on exactly the stored numbers."""
    W = randn(30, 50, dtype=dtype)
    assert torch.allclose(singular_values(W).values[0], torch.linalg.svdvals(W.double()), rtol=1e-10)


def test_work_in_float32_is_right_to_its_stated_resolution() -> None:
    W = randn(60, 90)
    s = singular_values(W, dtype=torch.float32)
    assert float((s.values[0] - torch.linalg.svdvals(W)).abs().max()) < s.resolution * float(s.values[0, 0])


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e-310])
def test_neither_overflows_nor_vanishes(scale: float) -> None:
    W = randn(6, 9) * scale
    assert torch.allclose(singular_values(W).values[0] / scale, torch.linalg.svdvals(W / scale), rtol=1e-6)
    assert float(spectrum(W)["stable_rank"]) == pytest.approx(float(spectrum(W / scale)["stable_rank"]), rel=1e-6)


def test_small_values_are_right_down_to_the_resolution() -> None:
    U, V = torch.linalg.qr(randn(50, 50)).Q, torch.linalg.qr(randn(80, 50, seed=1)).Q
    exact = torch.logspace(0, -12, 50, dtype=torch.float64)
    s = singular_values(U * exact @ V.T)
    above = exact > 3 * s.resolution
    assert float((s.values[0] / exact - 1).abs()[above].max()) < 0.05
    assert float(s.values[0][~above].max()) < 4 * s.resolution


@pytest.mark.parametrize(("m", "n"), [(7, 20), (20, 7), (300, 310), (1000, 129)])
def test_gram_has_the_lower_triangle(m: int, n: int) -> None:
    W = randn(m, n)
    G, scale = gram(W, torch.float64)
    expected = W @ W.T if m <= n else W.T @ W
    assert torch.allclose(G.tril() * scale**2, expected.tril(), rtol=1e-10, atol=1e-10)


def test_stacks_kernels_and_tables() -> None:
    stack = randn(3, 6, 9)
    assert torch.allclose(singular_values(stack).values, torch.linalg.svdvals(stack), rtol=1e-9)
    kernel = randn(6, 4, 3, 3)
    s = singular_values(kernel)
    assert (s.out_features, s.in_features) == (6, 36)
    assert torch.allclose(s.values[0], torch.linalg.svdvals(kernel.reshape(6, 36)), rtol=1e-9)
    grouped = singular_values(kernel, kind="conv", groups=2)
    assert torch.allclose(grouped.values, torch.linalg.svdvals(kernel.reshape(2, 3, 36)), rtol=1e-9)
    table = singular_values(randn(50, 4), kind="embedding")
    assert (table.out_features, table.in_features) == (4, 50)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_ranks_keep_their_order(values: list[float]) -> None:
    found = spectrum(torch.diag(torch.tensor(values, dtype=torch.float64)))
    names = ("stable_rank", "participation_ratio", "effective_rank_energy", "effective_rank", "numerical_rank")
    figures = [float(found[name]) for name in names]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(figures))
    assert figures[0] >= 1 - 1e-9
    assert float(found["rank_90"]) <= float(found["rank_95"]) <= float(found["rank_99"]) <= len(values)


def test_closed_forms() -> None:
    found = spectrum(torch.linalg.qr(randn(20, 8)).Q * 3)
    for name in ("stable_rank", "participation_ratio", "effective_rank", "effective_rank_energy", "numerical_rank"):
        assert float(found[name]) == pytest.approx(8)
    assert float(found["frobenius"]) == pytest.approx(3 * math.sqrt(8))
    assert float(found["spectral_norm"]) == pytest.approx(3)
    assert float(found["condition_number"]) == pytest.approx(1)
    assert float(found["break_even_rank"]) == pytest.approx(160 / 28)
    one = spectrum(torch.outer(randn(5), randn(7)))
    assert [float(one[name]) for name in ("rank_90", "rank_99", "numerical_rank")] == [1, 1, 1]
    assert float(one["effective_rank"]) == pytest.approx(1, abs=1e-5)
    assert one["condition_number"].at_least


def test_energy_rank_at_its_borders() -> None:
    values = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)  # 90 and 10 % of the energy
    assert [energy_rank(values, e) for e in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert energy_rank(torch.zeros(3, dtype=torch.float64), 0.9) == 0


def test_a_stack_gives_means_with_the_value_of_each() -> None:
    stack = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))])
    rank = spectrum(stack)["stable_rank"]
    assert rank.value == pytest.approx(2.5)
    assert rank.details["slices"] == pytest.approx([4.0, 1.0])
    with_zero = spectrum(torch.stack([torch.eye(4), torch.zeros(4, 4)]))["stable_rank"]
    assert with_zero.value == pytest.approx(4)
    assert with_zero.details["slices"] == [4.0, None]
    assert any("1 of 2" in note for note in with_zero.notes)


def test_zeros_have_a_norm_and_no_rank() -> None:
    found = spectrum(torch.zeros(4, 6))
    assert found["frobenius"].value == 0
    assert found["numerical_rank"].value == 0
    assert found["stable_rank"].value is None
    assert "zero" in found["stable_rank"].notes[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_quick_norms_are_those_of_the_spectrum(dtype: torch.dtype) -> None:
    W = randn(80, 120, dtype=dtype)
    W[0] += 2
    quick, exact = quick_norms(W), spectrum(W)
    assert float(quick["frobenius"]) == pytest.approx(float(exact["frobenius"]), rel=1e-5)
    for name in ("spectral_norm", "stable_rank"):
        assert quick[name].uncertainty is not None
        assert abs(float(quick[name]) - float(exact[name])) <= quick[name].uncertainty + 1e-4 * float(exact[name])
    assert quick_norms(torch.zeros(3, 4))["spectral_norm"].value == 0


def test_reads_views_that_are_not_contiguous() -> None:
    W = randn(30, 40)
    assert torch.allclose(singular_values(W.T).values, singular_values(W).values)
    assert torch.allclose(singular_values(W[::2, ::3]).values[0], torch.linalg.svdvals(W[::2, ::3]))


def test_refuses_an_unknown_working_precision() -> None:
    with pytest.raises(InputError, match="dtype"):
        singular_values(randn(3, 4), dtype=torch.float16)
