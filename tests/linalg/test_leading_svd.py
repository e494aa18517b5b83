"""The checked Krylov decomposition against LAPACK, on flat, falling, low-rank and small matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.linalg import leading_svd


def flat(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n), dtype=torch.float64)


def falling(m: int, n: int) -> Tensor:
    k = min(m, n)
    U, V = torch.linalg.qr(flat(m, k)).Q, torch.linalg.qr(flat(n, k)).Q
    return (U / torch.arange(1, k + 1, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(300, 260), (260, 300), (400, 400)])
@pytest.mark.parametrize("make", [flat, falling])
def test_close_to_lapack_and_within_its_bound(make, m: int, n: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    A = make(m, n).to(dtype)
    k = 12
    found = leading_svd(A, k)
    S = torch.linalg.svdvals(A.double())
    assert found.method == "krylov"
    assert found.error_bound <= 0.05
    # Weyl: each squared value lies within ‖R_i‖ of one of A's, and rounding of float32 adds little.
    nearest = (S.square()[None] - found.S.square()[:, None]).abs().min(1).values
    assert bool((nearest <= found.error_bound * found.S.square() + 1e-5 * S[0] ** 2).all())
    assert float((found.S / S[:k] - 1).abs().max()) < 0.03
    least = float(S[k:].square().sum().sqrt())
    left = float((A.double() - (found.U * found.S) @ found.Vh).norm())
    assert left <= least * 1.002
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(20, 30), (300, 40), (300, 300)])
def test_exact_where_krylov_would_not_pay(shape: tuple[int, int]) -> None:
    A = flat(*shape)
    k = min(shape)
    found = leading_svd(A, k)
    assert found.method != "krylov"
    assert found.error_bound == 0
    torch.testing.assert_close((found.U * found.S) @ found.Vh, A, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rank", [0, 3, 9])
def test_low_rank_and_zero_matrices_fall_back(rank: int) -> None:
    A = flat(400, rank) @ flat(rank, 380) if rank else torch.zeros(400, 380, dtype=torch.float64)
    found = leading_svd(A.float(), 12)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, A, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(A)[:12], atol=1e-3, rtol=1e-4)


def test_does_not_depend_on_the_state_of_torch() -> None:
    A = flat(300, 300).float()
    torch.manual_seed(1)
    one = leading_svd(A, 8)
    torch.manual_seed(2)
    two = leading_svd(A, 8)
    assert torch.equal(one.U, two.U)
    assert not torch.equal(one.U, leading_svd(A, 8, seed=1).U)


def test_a_tight_tolerance_takes_more_steps_or_the_exact_way() -> None:
    A = flat(300, 300)
    S = torch.linalg.svdvals(A)[:8]
    loose, tight = leading_svd(A, 8), leading_svd(A, 8, tolerance=1e-6)
    assert float((tight.S - S).abs().max()) < 1e-9 < float((loose.S - S).abs().max())


def test_bad_input() -> None:
    for rank in (0, 41):
        with pytest.raises(InputError, match="from 1 to"):
            leading_svd(torch.ones(40, 50), rank)
    with pytest.raises(InputError, match="real matrix"):
        leading_svd(torch.ones(40), 1)
    with pytest.raises(InputError, match="real matrix"):
        leading_svd(torch.ones(40, 40, dtype=torch.int64), 1)
    with pytest.raises(NotFiniteError, match="1 of 1600"):
        leading_svd(torch.ones(40, 40).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.inf)), 1)
