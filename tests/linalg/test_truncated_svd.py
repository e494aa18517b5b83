"""U S Vᴴ = A with fixed signs, and a bound that is never exceeded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import SVD, truncated_svd

METHODS = ["full", "gram", "randomized", "auto"]


def with_spectrum(S: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, len(S), dtype=torch.float64, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, len(S), dtype=torch.float64, generator=generator))
    return (U * S) @ V.T


def rebuilt(found: SVD) -> Tensor:
    return (found.U * found.S) @ found.Vh


def check_shape_and_signs(found: SVD, m: int, n: int, k: int) -> None:
    assert found.U.shape == (m, k)
    assert found.S.shape == (k,)
    assert found.Vh.shape == (k, n)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye, rtol=0, atol=1e-12)
    largest = found.U.gather(0, found.U.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert (found.S.diff() <= 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30), (1, 9), (9, 1)])
def test_best_approximation_of_a_falling_spectrum(method: str, shape: tuple[int, int]) -> None:
    m, n = shape
    r = min(m, n)
    S = 0.5 ** torch.arange(min(r, 20), dtype=torch.float64)
    A = with_spectrum(S, m, n)
    k = min(r, 6)
    found = truncated_svd(A, k, method=method)
    check_shape_and_signs(found, m, n, k)
    torch.testing.assert_close(found.S, S[:k], rtol=1e-6, atol=0)
    assert float((A - rebuilt(found)).norm()) == pytest.approx(float(S[k:].norm()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("method", ["full", "gram"])
def test_full_rank_rebuilds(method: str) -> None:
    A = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = truncated_svd(A, 12, method=method)
    torch.testing.assert_close(rebuilt(found), A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_less_rank_than_asked_stays_orthonormal(method: str) -> None:
    A = with_spectrum(torch.tensor([3.0, 1.0], dtype=torch.float64), 30, 20)
    found = truncated_svd(A, 5, method=method)
    check_shape_and_signs(found, 30, 20, 5)
    torch.testing.assert_close(rebuilt(found), A, rtol=0, atol=1e-12)
    zero = truncated_svd(torch.zeros(6, 4), 3, method=method)
    assert (zero.S == 0).all()
    assert zero.U.isfinite().all()


def test_bound_of_random_projection_holds_on_every_spectrum() -> None:
    i = torch.arange(1, 81, dtype=torch.float64)
    for S in (i**0, i**-0.5, i**-1, i**-2, 0.8**i, torch.cat([i[:10] * 0 + 1, i[10:] * 0 + 1e-3])):
        A = with_spectrum(S, 100, 80, seed=1)
        for k in (1, 5, 10, 30):
            for power in (0, 1, 2):
                found = truncated_svd(A, k, method="randomized", power=power)
                excess = float(((A - rebuilt(found)).norm() - S[k:].norm()) / S.norm())
                assert -1e-12 <= excess <= found.error_bound + 1e-12
                assert (found.S - S[:k] <= 1e-12 * S[0]).all()
    assert truncated_svd(with_spectrum(0.8**i, 100, 80), 10, method="randomized").error_bound < 0.02


def test_auto_follows_its_policy() -> None:
    i = torch.arange(1, 301, dtype=torch.float64)
    falling, flat = with_spectrum(0.8**i, 300, 320), with_spectrum(i**-0.1, 300, 320)
    assert truncated_svd(falling[:100], 5).method == "full"
    assert truncated_svd(falling, 20).method == "randomized"
    assert truncated_svd(flat, 20).method == "gram"  # the bound of a flat spectrum is loose
    assert truncated_svd(flat, 100).method == "gram"
    assert truncated_svd(falling, 100).method == "full"  # σ_100 = 2e-10 σ_1 is lost in a Gram matrix
    steep = with_spectrum(0.8 ** i[:50], 300, 320)
    assert truncated_svd(steep.float(), 50, rtol=-1).method == "gram"  # σ_50 = 2e-5 σ_1
    assert truncated_svd(steep.float().double(), 50, rtol=-1).method == "full"


def test_full_and_gram_agree_on_signs() -> None:
    A = with_spectrum(0.9 ** torch.arange(20, dtype=torch.float64), 25, 40)
    full, gram = truncated_svd(A, 20, method="full"), truncated_svd(A, 20, method="gram")
    torch.testing.assert_close(full.U, gram.U, rtol=0, atol=1e-9)
    torch.testing.assert_close(full.Vh, gram.Vh, rtol=0, atol=1e-9)


def test_same_seed_same_result_and_the_global_generator_is_left_alone() -> None:
    A = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = truncated_svd(A, 5, method="randomized")
    again = truncated_svd(A, 5, method="randomized", generator=torch.Generator().manual_seed(0))
    other = truncated_svd(A, 5, method="randomized", generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.S, again.S)
    assert not torch.equal(first.S, other.S)


def test_bad_input_is_refused() -> None:
    A = torch.ones(4, 3)
    for rank in (0, 4, -1):
        with pytest.raises(InputError, match="rank is from 1 to"):
            truncated_svd(A, rank)
    with pytest.raises(InputError, match="method is"):
        truncated_svd(A, 1, method="fast")
    with pytest.raises(InputError, match="count from 0"):
        truncated_svd(A, 1, power=-1)
    A[1, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="1 of 12 entries"):
        truncated_svd(A, 1)
