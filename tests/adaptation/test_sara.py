"""SaRA: signs, selection, and the direction of the nuclear norm."""

from __future__ import annotations

import pytest
import torch

from eckart.adaptation import Layout, Source
from eckart.adaptation.sara import Options, SaraDelta, take_turns
from eckart.errors import EckartWarning, InputError

LAYOUT = Layout(name="up", kind="linear", out_features=80, in_features=70)
WEIGHT = torch.randn(1, 80, 70, generator=torch.Generator().manual_seed(0))


def started(options: Options | None = None, rank: int = 4) -> SaraDelta:
    delta = SaraDelta(LAYOUT, rank, Options() if options is None else options)
    delta.start(Source(layout=LAYOUT, weight=WEIGHT))
    return delta


def test_small_weights_keep_their_sign() -> None:
    delta = started()
    assert bool((delta.origin < 0).any())
    assert torch.equal(delta.origin, WEIGHT.flatten()[delta.index])
    assert float(delta.delta().detach().abs().max()) == 0  # W + ΔW is W, negative entries and all


def test_picks_the_smallest_and_no_others() -> None:
    delta = started()
    picked = torch.zeros(80 * 70, dtype=torch.bool)
    picked[delta.index] = True
    magnitudes = WEIGHT.flatten().abs()
    largest, least_left = magnitudes[picked].max(), magnitudes[~picked].min()
    assert float(largest) <= float(least_left)
    assert delta.parameter_count() == 4 * (80 + 70)  # as LoRA of the rank


def test_default_rank_stays_below_the_threshold() -> None:
    source = Source(layout=LAYOUT, weight=WEIGHT)
    options = Options(threshold=0.3)
    rank = SaraDelta.default_rank(source, options)
    small = int((source.weight.abs() < 0.3).sum())
    assert small - rank * 150 in range(150)
    delta = SaraDelta(LAYOUT, rank, options)
    delta.start(source)
    assert float(delta.origin.abs().max()) < 0.3
    with pytest.warns(EckartWarning, match="left out"):
        assert SaraDelta.default_rank(source, Options(threshold=1e-9)) == 0


def test_penalty_is_the_nuclear_norm_and_its_gradient_the_polar_factor() -> None:
    delta = started(Options(strength=1.0))
    delta.fill(values=0.1 * torch.randn(600, generator=torch.Generator().manual_seed(2)))
    X = torch.zeros(80 * 70, dtype=torch.float64)
    X[delta.index] = (delta.origin + delta.values).detach().double()
    U, S, Vh = torch.linalg.svd(X.view(80, 70), full_matrices=False)
    penalty = delta.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(float(S.sum()), rel=5e-3)
    torch.autograd.backward(penalty)
    kept = S / S[0] > 1e-3
    exact = (U[:, kept] @ Vh[kept]).flatten()[delta.index]
    assert delta.values.grad is not None
    assert float((delta.values.grad.double() - exact).norm() / exact.norm()) < 0.02


def test_what_has_grown_is_frozen_whatever_the_optimiser_does() -> None:
    delta = started(Options(reselect=3))
    optimiser = torch.optim.Adam(delta.parameters(), lr=0.02)
    frozen = torch.zeros(0)
    for step in range(1, 8):
        optimiser.zero_grad()
        torch.autograd.backward((delta.delta() - 1.0).square().sum())
        optimiser.step()
        delta.after_step(step)
        if step == 3:
            assert 0 < int(delta.open.sum()) < 600
            limit = delta.origin.abs().max()
            grown = (delta.origin + delta.values).detach().abs() >= limit
            assert torch.equal(grown, ~delta.open)
            frozen = delta.change().detach()[~delta.open].clone()
    assert torch.equal(delta.change().detach()[~delta.open], frozen)
    assert not torch.equal(delta.values.detach()[~delta.open], frozen)  # Adam's momentum has gone on


def test_layers_take_turns_and_small_ones_have_no_penalty() -> None:
    deltas = [started() for _ in range(3)]
    small = SaraDelta(Layout(name="s", kind="linear", out_features=9, in_features=8), 1, Options())
    take_turns([deltas[0], small, *deltas[1:]])
    for step in range(6):
        assert [d.penalty() is not None for d in deltas] == [step % 3 == i for i in range(3)]
        assert small.penalty() is None
        for delta in (*deltas, small):
            delta.after_step(step + 1)


def test_refusals() -> None:
    thin = Layout(name="t", kind="linear", out_features=1, in_features=5)
    assert SaraDelta.fits(thin, Options()) is not None
    with pytest.raises(InputError, match="3 problems"):
        Options(threshold=0.0, strength=-1.0, reselect=-1)
