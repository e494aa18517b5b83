"""Ranks by budget, and what single methods say of themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from eckart.adaptation import Layout, Source, gains, limit, quantised_split, spread_ranks
from eckart.adaptation.salt import Options as SaltOptions
from eckart.adaptation.salt import SaltDelta
from eckart.adaptation.soka import Options as SokaOptions
from eckart.adaptation.soka import SokaDelta, rearranged
from eckart.adaptation.sorsa import Options as SorsaOptions
from eckart.adaptation.sorsa import SorsaDelta
from eckart.adaptation.svfit import Options as SvfitOptions
from eckart.adaptation.svfit import SvfitDelta
from eckart.errors import BudgetError, InputError
from eckart.layers.quantised import QuantisedLinear
from eckart.linalg import round_groups
from eckart.moments import SiteMoments
from eckart.records import Budget


def source(m: int, n: int, slices: int = 1, seed: int = 0, moments: tuple[SiteMoments, ...] = ()) -> Source:
    weight = torch.randn(slices, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layout = Layout(name="up", kind="conv" if slices > 1 else "linear", out_features=m, in_features=n, slices=slices)
    return Source(layout=layout, weight=weight, moments=moments)


def test_greedy_is_best_among_all_for_equal_costs() -> None:
    worth = [torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.4, 0.3, 0.05]), torch.tensor([0.25, 0.24, 0.23])]
    ranks = spread_ranks(worth, [lambda r: 10 * r] * 3, 55)
    assert sum(ranks) == 5

    def gained(ranks: tuple[int, ...]) -> float:
        return sum(float(w[:r].sum()) for w, r in zip(worth, ranks, strict=True))

    best = max(gained(c) for c in itertools.product(range(4), repeat=3) if sum(c) <= 5)
    assert gained(tuple(ranks)) == pytest.approx(best)


def test_spends_what_still_fits_and_says_what_is_least() -> None:
    worth = [torch.tensor([1.0, 1.0]), torch.tensor([0.1])]
    assert spread_ranks(worth, [lambda r: 10 * r, lambda r: 3 * r], 14) == [1, 1]
    assert spread_ranks(worth, [lambda r: 10 * r, lambda r: 3 * r], 9) == [0, 1]
    with pytest.raises(BudgetError, match="3"):
        spread_ranks(worth, [lambda r: 10 * r, lambda r: 3 * r], 2)
    assert spread_ranks([], [], 2) == []


def test_what_a_direction_is_worth() -> None:
    given = source(6, 5, slices=2)
    shares = torch.linalg.svdvals(given.weight).square() / given.weight.square().sum((1, 2))[:, None]
    torch.testing.assert_close(gains(given, "weight", 5), shares.mean(0))
    second = torch.diag(torch.tensor([4.0, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64))
    gradient = torch.diag(torch.arange(6.0, dtype=torch.float64))
    moments = SiteMoments(count=9, mean=torch.zeros(5, dtype=torch.float64), second=second, gradient=gradient)
    given = source(6, 5, moments=(moments,))
    assert gains(given, "activation", 3).tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert gains(given, "gradient", 3).tolist() == pytest.approx([50.0, 40.0, 30.0])
    with pytest.raises(InputError, match="need moments"):
        gains(source(6, 5), "activation", 3)
    lacking = SiteMoments(count=9, mean=moments.mean, second=second)
    with pytest.raises(InputError, match="moments of its gradients"):
        gains(source(6, 5, moments=(lacking,)), "gradient", 3)
    with pytest.raises(InputError, match="'gradient'"):
        gains(given, "gradients", 3)  # type: ignore[arg-type]


def test_limits() -> None:
    layouts = [source(6, 5).layout, source(4, 3, slices=2).layout]
    assert limit(Budget(parameters=17), layouts, 1000) == 17
    assert limit(Budget(keep=0.5), layouts, 1000) == 27
    assert limit(Budget(model_keep=0.01), layouts, 1000) == 10
    with pytest.raises(InputError, match="Budget"):
        limit(Budget(macs=5), layouts, 1000)


def test_kronecker_terms_are_the_nearest_ones() -> None:
    """A sum of three Kronecker products is found to rounding by three terms, and not by two."""
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    Q = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    W = sum(torch.kron(p, q) for p, q in zip(P, Q, strict=True))
    layout = Layout(name="up", kind="linear", out_features=24, in_features=15)
    given = Source(layout=layout, weight=W[None])  # type: ignore[index]
    for rank, close in ((3, True), (2, False)):
        delta = SokaDelta(layout, rank, SokaOptions())
        delta.start(given)
        built = sum(torch.kron(p, q) for p, q in zip(delta.P0[0], delta.Q0[0], strict=True))
        assert torch.allclose(built.double(), W, atol=1e-4) is close  # type: ignore[union-attr]
    assert SokaDelta.default_rank(given, SokaOptions(rule="energy", energy=1.0)) == 3
    assert rearranged(W[None], (4, 3)).shape == (1, 12, 30)  # type: ignore[index]


def test_a_prime_size_still_splits() -> None:
    layout = Layout(name="up", kind="linear", out_features=7, in_features=12)
    assert SokaDelta.most(layout, SokaOptions()) == 3
    delta = SokaDelta(layout, 2, SokaOptions())
    delta.start(source(7, 12))
    assert delta.delta().shape == (1, 7, 12)


def test_elbow_and_energy() -> None:
    values = torch.tensor([10.0, 9.0, 8.0, 1.0, 0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    R = (Q * values) @ V.T  # what a weight of 64 × 64 in blocks of 8 × 8 rearranges to
    W = R.reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64)
    layout = Layout(name="up", kind="linear", out_features=64, in_features=64)
    given = Source(layout=layout, weight=W[None])
    assert SokaDelta.default_rank(given, SokaOptions(rule="energy", energy=0.98)) == 3
    assert SokaDelta.default_rank(given, SokaOptions(rule="elbow")) == 8  # the 56 zeros behind are the longer arm


def test_svfit_takes_the_least_rank_with_the_energy() -> None:
    given = source(9, 7, slices=2)
    squares = torch.linalg.svdvals(given.weight).square()
    for energy in (0.3, 0.8, 1.0):
        rank = SvfitDelta.default_rank(given, SvfitOptions(energy=energy))
        kept = squares[:, :rank].sum(1) / squares.sum(1)
        assert bool((kept >= energy - 1e-9).all())
        assert rank == 1 or bool((squares[:, : rank - 1].sum(1) / squares.sum(1) < energy).any())


def test_salt_acts_outside_of_the_leading_directions_and_clips_at_zero() -> None:
    given = source(10, 8)
    delta = SaltDelta(given.layout, 3, SaltOptions(rest=2))
    delta.start(given)
    delta.fill(shift=torch.full((1, 3), -1e6), Y=torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)))
    left = given.weight[0] + delta.delta()[0].detach()
    inside = delta.U[0].double().T @ left @ delta.Vh[0].double().T
    assert float(inside.abs().max()) < 1e-5  # the leading values are gone, not negative


def test_sorsa_penalty_is_the_papers() -> None:
    given = source(10, 8)
    delta = SorsaDelta(given.layout, 3, SorsaOptions(gamma=2.0))
    delta.start(given)
    assert float(delta.penalty().detach()) < 1e-5  # type: ignore[union-attr]
    delta.fill(U=2 * delta.U.detach())
    wanted = 2.0 * 0.5 * float((3 * torch.eye(3)).norm())
    assert float(delta.penalty().detach()) == pytest.approx(wanted, rel=1e-5)  # type: ignore[union-attr]


def test_sorsa_exact_vectors_stay_orthonormal_under_adam() -> None:
    given = source(10, 8)
    delta = SorsaDelta(given.layout, 3, SorsaOptions(orthonormal="exact"))
    delta.start(given)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward((delta.delta() - 1.0).square().sum())
        optimizer.step()
    U, Vh = (part.detach() for part in delta.vectors())
    torch.testing.assert_close(U.mT @ U, torch.eye(3)[None], atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(3)[None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_beside_factors_loses_less(bits: int) -> None:
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    nearest = round_groups(W, bits=bits, group=16).dense()
    one = quantised_split(W, rank=8, bits=bits, group=16, rounds=1)
    many = quantised_split(W, rank=8, bits=bits, group=16)
    lost = [float((W - dense).norm()) for dense in (nearest, one.dense(), many.dense())]
    assert lost[2] <= lost[1] < lost[0]
    layer = torch.nn.Linear(48, 64, bias=False)
    layer.weight = torch.nn.Parameter(W)
    rounded = round_groups(W, bits=bits, group=16) if bits == 3 else many.rounded
    if bits != 3:  # three bits do not fill a byte
        quantised = QuantisedLinear.from_linear(layer, rounded, (many.A, many.B))
        torch.testing.assert_close(quantised.dense(), many.dense(), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="rounds"):
        quantised_split(W, rank=8, rounds=0)
